"""A place that cannot be written is said before the first step, not at the first save: nothing is trained for nothing."""

from programs import recipe
from servers import s3
from test_bad_input import _cache, program, said  # noqa: F401 - fixtures


def untrained(folder):
    return not (folder / "metrics.jsonl").exists() and not list(folder.glob("step-*"))


def test_a_run_folder_that_cannot_be_made(tmp_path, program):  # noqa: F811
    config, _ = recipe(tmp_path)
    (tmp_path / "file").write_text("")
    code, output = program("pretrain", config, f"run.dir={tmp_path}/file")
    assert code == 1
    said(output, "run.dir", f"{tmp_path}/file", "Not a directory")


def test_a_folder_for_checkpoints_that_cannot_be_written(tmp_path, program):  # noqa: F811
    config, folder = recipe(tmp_path)
    (tmp_path / "file").write_text("")
    code, output = program("pretrain", config, f"checkpoint.dir={tmp_path}/file/x")
    assert code == 1 and untrained(folder)
    said(output, "checkpoint.dir", f"{tmp_path}/file/x", "Not a directory")


def test_a_bucket_that_does_not_exist(tmp_path, program, monkeypatch):  # noqa: F811
    config, folder = recipe(tmp_path)
    with s3() as url:
        for name, value in (("AWS_ACCESS_KEY_ID", "one"), ("AWS_SECRET_ACCESS_KEY", "two"), ("AWS_ENDPOINT_URL", url)):
            monkeypatch.setenv(name, value)
        code, output = program("pretrain", config, "checkpoint.dir=s3://typo/runs/r")
    assert code == 1 and untrained(folder)
    said(output, "checkpoint.dir", "s3://typo/runs/r", "bucket does not exist")

