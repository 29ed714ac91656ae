"""The least that trains with DeepSpeed: what `Trainer` is held against in cost, by a test and by a benchmark."""


from tubelet.engine.blocks import blocks_of
from tubelet.engine.optim import build_optimizer, parameter_groups
from tubelet.engine.zero.deepspeed_config import derive
from tubelet.engine.zero.engine import _gather_by_block, _initialize, _numel


class BareLoop:
    """`deepspeed.initialize` with the same configuration, leaf modules and optimizer, and nothing else of ours."""

    def __init__(self, module, settings, objective, world, device, micro_batch_size):
        self.objective, self.device, self.seed = objective, device, settings.seed
        accumulation = settings.global_batch_size // (micro_batch_size * world.size)
        groups = parameter_groups(module, settings.optimizer)
        config = derive(settings, "fp32", world_size=world.size, micro_batch_size=micro_batch_size,
                        accumulation=accumulation, numel=sum(param.numel() for param in module.parameters()),
                        largest_block=max((_numel(block) for _, block in blocks_of(module)), default=0))
        self.accumulation = accumulation
        if settings.zero.stage == 3:
            _gather_by_block(module)
        self.engine = _initialize(module, build_optimizer(groups, settings.optimizer, device), config)

    def steps(self, stream, count):
        """Train `count` global batches."""
        for _ in range(count):
            for _ in range(self.accumulation):
                batch = next(stream)
                batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
                loss = self.objective(self.engine, batch)["loss"]
                self.engine.backward(loss)
                self.engine.step()
