"""Settings: every problem at once, with the nearest name; precedence; what may change on resume."""

import pytest

from tubelet import config
from tubelet.config import Settings, fixed, free, load, parse_overrides, recorded
from tubelet.errors import ConfigError


class Inner(Settings):
    lr: float = recorded(1e-3, gt=0)
    """Learning rate."""
    width: int = fixed(8)


class Source(Settings):
    shards: str = free()
    weight: float = fixed(1.0)


class Outer(Settings):
    optimizer: Inner = Inner()
    sources: list[Source] = fixed([])
    name: str = free("x")
    extra: dict = fixed({})


def write(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_three_typos_are_reported_together_with_the_nearest_names(tmp_path):
    path = write(tmp_path, "optimiser: {lr: 1}\nnam: y\noptimizer: {widht: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load(Outer, path)
    text = str(caught.value)
    assert "3 problems" in text
    for wrong, right in (("optimiser", "optimizer"), ("nam", "name"), ("optimizer.widht", "optimizer.width")):
        line = next(part for part in text.split("`" + wrong + "` is not a setting")[1:])
        assert "Try: " in line and right in line.split("Try: ")[1].splitlines()[0]
    assert str(path) in text


def test_a_wrong_value_names_the_option_the_value_and_where_it_was_set(tmp_path):
    path = write(tmp_path, "optimizer: {lr: -3}\n")
    with pytest.raises(ConfigError, match=r"`optimizer.lr` = -3.*greater than 0.*c\.yaml") as caught:
        load(Outer, path)
    assert "Learning rate" in caught.value.hint


def test_precedence_is_default_base_file_overlay_command_line(tmp_path):
    write(tmp_path, "name: base\noptimizer: {lr: 2, width: 5}\nextra: {a: 1}\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\noptimizer: {lr: 3}\nextra: {b: 2}\n")
    loaded = load(Outer, path, ["optimizer.width=7"], lambda data: {"extra": {"c": data["optimizer"]["lr"]}}, "over")
    assert loaded.settings.model_dump() == {"optimizer": {"lr": 3.0, "width": 7}, "sources": [], "name": "base",
                                            "extra": {"a": 1, "b": 2, "c": 3}}
    assert loaded.sources["optimizer.width"] == "command line" and loaded.sources["extra.c"] == "over"


def test_printed_settings_read_back_equal(tmp_path):
    path = write(tmp_path, "sources: [{shards: 'a-{00..03}.tar', weight: 1e-3}]\nname: 'yes'\nextra: {k: [1, {x: null}]}\n")
    loaded = load(Outer, path, ["optimizer.lr=3e-4"])
    again = load(Outer, write(tmp_path, loaded.as_yaml(), "again.yaml"))
    assert again.settings == loaded.settings
    assert "# command line" in loaded.as_yaml()


def test_overrides_take_three_spellings_and_yaml_values():
    assert parse_overrides(["a.b=1e-3", "--c-d", "[1, 2]", "--e.f=true", "g="]) == {
        "a.b": 1e-3, "c_d": [1, 2], "e.f": True, "g": None}
    with pytest.raises(ConfigError, match="`oops` is not an override"):
        parse_overrides(["oops"])


def test_braces_that_the_shell_expanded_are_refused_and_the_last_of_other_keys_counts():
    with pytest.raises(ConfigError, match="quotes, if the shell expanded braces") as caught:
        parse_overrides(["data.train=x-0.tar", "data.train=x-1.tar", "data.train=x-2.tar"])
    assert "x-0.tar and x-1.tar" in str(caught.value)
    assert parse_overrides(["lr=1", "lr=2"]) == {"lr": 2}


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`name` is given twice"):
        load(Outer, write(tmp_path, "name: a\nname: b\n"))


def test_yaml_that_would_run_code_is_refused(tmp_path):
    victim = tmp_path / "ran"
    path = write(tmp_path, f"name: !!python/object/apply:os.system ['touch {victim}']\n")
    with pytest.raises(ConfigError):
        load(Outer, path)
    assert not victim.exists()


def test_a_missing_config_names_its_neighbours(tmp_path):
    write(tmp_path, "name: a\n", "vit_b16.yaml")
    with pytest.raises(ConfigError, match="vit_b61.yaml cannot be read") as caught:
        load(Outer, tmp_path / "vit_b61.yaml")
    assert "vit_b16" in caught.value.hint


def test_differences_carry_what_may_be_done_about_them():
    old = {"optimizer": {"lr": 1.0, "width": 8}, "sources": [{"shards": "a", "weight": 1.0}], "name": "x", "extra": {}}
    new = {"optimizer": {"lr": 2.0, "width": 9}, "sources": [{"shards": "b", "weight": 2.0}], "name": "y",
           "extra": {"k": 1}}
    found = {item.key: item.resume for item in config.differences(Outer, old, new)}
    assert found == {"optimizer.lr": "recorded", "optimizer.width": "fixed", "sources.0.shards": "free",
                     "sources.0.weight": "fixed", "name": "free", "extra": "fixed", "extra.k": "fixed"}


def test_a_setting_that_no_longer_exists_does_not_stop_a_resume_and_a_mapping_of_the_users_own_does():
    old = {"optimizer": {"lr": 1.0, "width": 8, "gone": True}, "retired": {"deep": 1}, "name": "x", "extra": {"k": 1}}
    new = {"optimizer": {"lr": 1.0, "width": 8}, "name": "x", "extra": {}}
    assert {item.key for item in config.differences(Outer, old, new)} == {"extra.k"}
