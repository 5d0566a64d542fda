"""Sharpness-aware minimisation."""

import torch
from torch.optim import Optimizer


class SAM(Optimizer):
    """Sharpness-aware minimisation around any optimiser (Foret et al., ICLR 2021).

    A step needs two gradients. Backward once (over all accumulation slices and processes), then [`ascend`] moves the
    weights to the worst point nearby and clears the gradients; backward again there, and [`step`] puts the weights
    back and lets the wrapped optimiser use the second gradient::

        loss(batch).backward()
        optimizer.ascend()
        loss(batch).backward()
        optimizer.step()

    The perturbation is `rho * g / ||g||`, with the norm over all parameters and `rho` that of the parameter's group. It
    does not depend on the scale of the gradient, so that a `GradScaler` needs to unscale nothing before. Without
    [`ascend`], [`step`] is the wrapped optimiser's. The state that is saved is the wrapped optimiser's: between steps
    the weights are never perturbed.

    With a `GradScaler`, which leaves out the step after an overflow, call [`restore`] before its `step`.

    Args:
        base_optimizer: Does the step. Its parameter groups are shared; a group's own `rho` overrides the argument.
        rho: Radius of the neighbourhood, in weight space; 0.05 in the paper of SAM, 0.8 for the CIFAR teachers of
            DeiT-LT.
        adaptive: Scale the perturbation of each weight by its magnitude (ASAM; Kwon et al., ICML 2021).

    Raises:
        ValueError: If rho is negative.
    """

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False):
        for group in base_optimizer.param_groups:
            if group.setdefault("rho", rho) < 0:
                raise ValueError(f"rho must not be negative, got {group['rho']}.")
        self.base_optimizer = base_optimizer
        self.adaptive = adaptive
        self._perturbed: dict[torch.nn.Parameter, torch.Tensor] = {}
        super().__init__(base_optimizer.param_groups, {**base_optimizer.defaults, "rho": rho})
        # One set of groups and states for both, so that schedulers, checkpoints and `add_param_group` reach them.
        self.param_groups = base_optimizer.param_groups
        self.state = base_optimizer.state

    def __getstate__(self) -> dict:
        own = ("base_optimizer", "adaptive", "_perturbed")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @torch.no_grad()
    def ascend(self) -> None:
        """Moves the weights to the approximate worst point within `rho`, remembers them, and clears the gradients.

        A gradient that is not finite, as after an overflow in half precision, moves nothing: the second pass finds the
        overflow again.

        Raises:
            RuntimeError: If the weights are perturbed already.
        """
        if self._perturbed:
            raise RuntimeError("the weights are perturbed already; call step or restore before the next ascend.")
        perturbed = [(group["rho"], parameter) for group in self.param_groups for parameter in group["params"]]
        perturbed = [(rho, parameter) for rho, parameter in perturbed if parameter.grad is not None]
        directions = (self._direction(parameter, scaled=True) for _, parameter in perturbed)
        # At least in float32: squares of gradients leave the range of half precision.
        norms = [torch.linalg.vector_norm(d, dtype=torch.promote_types(d.dtype, torch.float32)) for d in directions]
        if norms:
            norm = torch.linalg.vector_norm(torch.stack([value.to(norms[0].device) for value in norms]))
        for rho, parameter in perturbed:
            if rho == 0:
                continue
            self._perturbed[parameter] = parameter.detach().clone()
            length = norm.to(parameter.device)
            step = self._direction(parameter) * (rho / (length + 1e-12)).to(parameter.dtype)
            # A choice on the device: asking for its result would make every step wait.
            parameter.add_(torch.where(length.isfinite(), step, 0.0))
        self.zero_grad()

    def _direction(self, parameter: torch.nn.Parameter, scaled: bool = False) -> torch.Tensor:
        """Where a parameter is moved; scaled as in the norm that its length is divided by."""
        assert parameter.grad is not None  # others are not asked about
        if not self.adaptive:
            return parameter.grad
        return parameter.grad * (parameter.abs() if scaled else parameter.square())

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back to where [`ascend`] found them."""
        for parameter, weight in self._perturbed.items():
            parameter.copy_(weight)
        self._perturbed.clear()

    def step(self, closure=None):
        """Restores the weights and takes the wrapped optimiser's step."""
        self.restore()
        return self.base_optimizer.step(closure)

    def state_dict(self) -> dict:
        """The wrapped optimiser's state, which is all there is between steps."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the wrapped optimiser's state, that of a run without SAM too."""
        rhos = [group["rho"] for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)
