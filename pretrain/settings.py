"""Settings of `python -m pretrain`."""

from tubelet.program.settings import ProgramSettings


class PretrainSettings(ProgramSettings):
    """Pretraining begins from scratch unless `init` says otherwise."""
