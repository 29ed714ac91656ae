"""Settings of `python -m finetune`."""

from pydantic import model_validator

from tubelet.config import fixed
from tubelet.program.settings import ProgramSettings


class FinetuneSettings(ProgramSettings):
    """Fine-tuning begins from weights, and is evaluated."""

    from_scratch: bool = fixed(False)
    """Start from random weights after all (the control experiment of a transfer)."""

    @model_validator(mode="after")
    def _weights_are_named(self) -> "FinetuneSettings":
        if not (self.init.weights or self.init.from_run or self.from_scratch):
            raise ValueError("fine-tuning starts from weights: set init.weights=runs/NAME, a folder with "
                             "model.safetensors, or timm:NAME (or from_scratch=true for the control run)")
        if self.from_scratch and self.init.weights:
            self.init.weights = None
        return self
