"""Sharpness-aware minimisation (SAM) as a wrapper of an optimiser."""

from collections.abc import Callable
from typing import overload

import torch
from torch.optim import Optimizer


class SAM(Optimizer):
    """Sharpness-aware minimisation around any optimiser (Foret et al., ICLR 2021).

    A step needs two gradients. After the first backward pass (over all micro-batches and processes), [`ascend`] moves
    the weights to the approximate worst point nearby and clears the gradients. After the second backward pass, at that
    point, [`step`] restores the weights and applies the wrapped optimiser with the second gradient::

        loss(batch).backward()
        optimizer.ascend()
        loss(batch).backward()
        optimizer.step()

    The perturbation is `rho * g / ||g||`. The norm is taken over all parameters, and `rho` is the value of the
    parameter's group. The perturbation does not depend on the scale of the gradient, so a `GradScaler` does not need to
    unscale before [`ascend`]. Without [`ascend`], [`step`] equals the step of the wrapped optimiser. The saved state is
    the state of the wrapped optimiser, because the weights are never perturbed between steps.

    A `GradScaler` skips the step after an overflow. With one, call [`restore`] before its `step`.

    Args:
        base_optimizer: The optimiser that performs the step. Its parameter groups are shared. `rho` in a group
            overrides the argument.
        rho: Radius of the neighbourhood, in weight space; 0.05 in the SAM paper, 0.8 for the CIFAR teachers of DeiT-LT.
        adaptive: Scale the perturbation of each weight by its magnitude (ASAM; Kwon et al., ICML 2021).

    Raises:
        ValueError: If rho is negative.
    """

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False) -> None:
        for group in base_optimizer.param_groups:
            if group.setdefault("rho", rho) < 0:
                raise ValueError(f"rho must not be negative, got {group['rho']}.")
        self.base_optimizer = base_optimizer
        self.adaptive = adaptive
        self._perturbed: dict[torch.nn.Parameter, torch.Tensor] = {}
        # torch's schedulers and Accelerate take subclasses of Optimizer only.
        super().__init__(base_optimizer.param_groups, {**base_optimizer.defaults, "rho": rho})
        # Both optimisers share groups and state: schedulers, checkpoints and `add_param_group` then affect both.
        self.param_groups = base_optimizer.param_groups
        self.state = base_optimizer.state

    def __getstate__(self) -> dict:
        # torch's method returns groups, state and defaults only: a copy would lack these.
        own = ("base_optimizer", "adaptive", "_perturbed")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @torch.no_grad()
    def ascend(self) -> None:
        """Saves the weights, moves them to the approximate worst point within `rho`, and clears the gradients.

        A gradient that is not finite, as after an overflow in half precision, does not move the weights: the second
        backward pass produces the overflow again. It raises `RuntimeError` if the weights are already perturbed.
        """
        if self._perturbed:
            raise RuntimeError("the weights are perturbed already; call step or restore before the next ascend.")
        perturbed = [(group["rho"], parameter) for group in self.param_groups for parameter in group["params"]]
        perturbed = [(rho, parameter) for rho, parameter in perturbed if parameter.grad is not None]
        # A generator: ASAM's scaled gradients exist one at a time, not as a second set of all gradients.
        directions = (self._direction(parameter, scaled=True) for _, parameter in perturbed)
        # Norms in float32 or wider: squares of gradients overflow or underflow in half precision.
        norms = [torch.linalg.vector_norm(d, dtype=torch.promote_types(d.dtype, torch.float32)) for d in directions]
        if norms:
            # Parameters can be on several devices.
            norm = torch.linalg.vector_norm(torch.stack([value.to(norms[0].device) for value in norms]))
        for rho, parameter in perturbed:
            # A group of radius 0 stays: without a copy, it costs no memory.
            if rho == 0:
                continue
            # A copy: subtracting the perturbation again would leave rounding errors in the weights.
            self._perturbed[parameter] = parameter.detach().clone()
            length = norm.to(parameter.device)
            # 1e-12 for a gradient of zero.
            step = self._direction(parameter) * (rho / (length + 1e-12)).to(parameter.dtype)
            # `torch.where`, because an `if` would synchronise the device in every step.
            parameter.add_(torch.where(length.isfinite(), step, 0.0))
        self.zero_grad()  # the second pass must not add to the first gradient

    def _direction(self, parameter: torch.nn.Parameter, scaled: bool = False) -> torch.Tensor:
        """Direction in which a parameter moves. With `scaled`, its scaled gradient for the norm instead."""
        assert parameter.grad is not None  # callers pass only parameters with a gradient
        # ASAM with T = |w| moves along T^2 g / ||T g||.
        if not self.adaptive:
            return parameter.grad
        return parameter.grad * (parameter.abs() if scaled else parameter.square())

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the weights from before [`ascend`]."""
        for parameter, weight in self._perturbed.items():
            parameter.copy_(weight)
        self._perturbed.clear()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Restores the weights and takes the wrapped optimiser's step."""
        self.restore()
        return self.base_optimizer.step(closure)

    def state_dict(self) -> dict:
        """State of the wrapped optimiser. Between steps SAM has no other state."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the state of the wrapped optimiser, also one from a run without SAM."""
        rhos = [group["rho"] for group in self.param_groups]  # before the groups are replaced
        self.base_optimizer.load_state_dict(state_dict)
        # torch's `load_state_dict` replaces groups and state by new objects, so they are shared again.
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)  # a state saved without SAM has no rho
