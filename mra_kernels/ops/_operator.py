"""What the twelve ops share: registration with PyTorch, argument checks, autocast, differentiation.

An op is declared by two schemas. Autograd follows from their names: an argument of the backward schema that is called
like an input or output of the forward is saved for it, `grad_<output>` is that output's gradient, and each
return `grad_<input>` belongs to that input. `needs` says, in the order of the returns, which gradients to compute;
the others come back as empty tensors.

A forward whose schema has `bool keep` before the backend returns, where it is true, also what only backward reads. The
public function sets it when autograd records; where it is false, that return is an empty tensor, and a backward that
misses it computes it again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mra_kernels.dispatch import Backend, choose

LIBRARY = torch.library.Library("mra", "DEF")
REGISTRY: dict[str, "Operator"] = {}


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, means and statistics over tensors of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Operator:
    """One op of the library `mra`.

    Args:
        forward: schema after the name, ending in `str backend` or `bool keep, str backend`; its returns are the
            public outputs, then what is kept for backward.
        backward: schema of the backward op, see the module's docstring; it ends in `bool[] needs, str backend`.
        reference: the definition in plain PyTorch; takes the forward's arguments, returns the public outputs.
        fake: shapes and dtypes of all returns, as empty tensors; gets the forward's arguments, and `keep`.
        check: raises on wrong shapes; gets the forward's arguments.
        backends: by name, a kernel backend, or the reason why there is none.
        public: how many of the returns the caller sees.
        wide: arguments kept in the accumulator's dtype: gates and means.
        added: input that the first output is the sum of; its gradient is the output's, and it is not saved.
        summed: two inputs whose sum is the first output, and of which nothing else is read: backward takes the sum
            instead, and returns the gradient of the first of them, which is the second one's, too.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: str,
        backward: str,
        reference: Callable,
        fake: Callable,
        check: Callable,
        backends: dict[str, Backend | str],
        public: int = 1,
        wide: Sequence[str] = (),
        added: str | None = None,
        summed: tuple[str, str] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.backends = backends
        self._fake = fake
        self._check = check
        REGISTRY[name] = self
        self._public = public
        self._added = added
        self._summed = summed

        LIBRARY.define(name + forward)
        LIBRARY.define(f"{name}_backward{backward}")
        namespace = torch.ops.mra
        self._forward_op = getattr(namespace, name).default
        self._backward_op = getattr(namespace, f"{name}_backward").default

        schema = self._forward_op._schema
        self._inputs = [argument.name for argument in schema.arguments if argument.name not in ("keep", "backend")]
        self._keeps = any(argument.name == "keep" for argument in schema.arguments)
        self._tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
        self._narrow = [n for n in self._tensors if n not in wide]
        self._wide = list(wide)
        self._outputs = [r.name for r in schema.returns]
        backward_schema = self._backward_op._schema
        self._backward_inputs = [argument.name for argument in backward_schema.arguments[:-2]]
        self._differentiable = [r.name.removeprefix("grad_") for r in backward_schema.returns]

        LIBRARY.impl(name, self._run_forward, "CompositeExplicitAutograd")
        LIBRARY.impl(f"{name}_backward", self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mra::{name}", self._fake_forward, lib=LIBRARY)
        torch.library.register_fake(f"mra::{name}_backward", self._fake_backward, lib=LIBRARY)
        torch.library.register_autograd(f"mra::{name}", self._differentiate, setup_context=self._save, lib=LIBRARY)
        self._recorded = self._make_function()

    def __call__(self, *args: Any) -> Any:
        """The op as users call it: checked, cast under autocast, served by the chosen backend."""
        device, dtype = args[0].device.type, args[0].dtype
        # Not every device type, meta for one, may be asked whether autocast is enabled.
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return self._serve(args)
        if dtype != torch.float64:
            args = self._autocast(args, torch.get_autocast_dtype(device))
        # The arguments have their dtypes now; inside the reference autocast would cast gates and means once more.
        with torch.autocast(device, enabled=False):
            return self._serve(args)

    def _serve(self, args: tuple) -> Any:
        self._check_types(args)
        self._check(*args)
        lead: Tensor = args[self._inputs.index(self._narrow[0])]
        backend = choose(self.name, self.backends, lead.device, lead.dtype)
        if backend == "reference":
            return self.reference(*args)
        recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        keep = (recorded,) if self._keeps else ()
        if not _is_unwatched(args):
            outputs = self._forward_op(*args, *keep, backend)
        elif recorded:
            outputs = self._recorded.apply(*args, *keep, backend)
        else:
            outputs = self._run_forward(*args, *keep, backend)
        if len(self._outputs) == 1:
            return outputs
        return outputs[0] if self._public == 1 else tuple(outputs[: self._public])

    def _autocast(self, args: tuple, dtype: torch.dtype) -> tuple:
        return tuple(
            value.to(dtype if name in self._narrow else torch.float32) if isinstance(value, Tensor) else value
            for name, value in zip(self._inputs, args, strict=True)
        )

    def _check_types(self, args: tuple) -> None:
        named = dict(zip(self._inputs, args, strict=True))
        lead = named[self._narrow[0]]
        if not lead.dtype.is_floating_point:
            raise TypeError(f"{self.name}: {self._narrow[0]} must be floating point, but is {lead.dtype}")
        for names, dtype in ((self._narrow, lead.dtype), (self._wide, accumulator_dtype(lead.dtype))):
            for name in names:
                tensor = named[name]
                if tensor is None:
                    continue
                if tensor.dtype != dtype:
                    raise TypeError(
                        f"{self.name}: {name} is {tensor.dtype}, but must be {dtype} beside {self._narrow[0]} "
                        f"of {lead.dtype}; convert it with .to({dtype})"
                    )
                if tensor.device != lead.device:
                    raise ValueError(
                        f"{self.name}: {name} is on {tensor.device}, but {self._narrow[0]} is on {lead.device}; "
                        f"move both to one device"
                    )

    # What PyTorch calls.

    def _pack(self, outputs: Any) -> Any:
        """A single return must be a bare tensor, several a tuple."""
        return outputs[0] if len(self._outputs) == 1 else tuple(outputs)

    def _kernel(self, backend: str) -> Backend:
        kernel = self.backends.get(backend, "there is no such backend")
        if isinstance(kernel, str):
            raise RuntimeError(f"mra::{self.name} on backend {backend}: {kernel}")
        return kernel

    def _run_forward(self, *args: Any) -> Any:
        *inputs, backend = args
        if backend != "reference":
            return self._kernel(backend).forward(*inputs)
        inputs = inputs[: len(self._inputs)]
        return self._pack(self._reference_outputs(inputs, inputs[0]))

    def _reference_outputs(self, inputs: Sequence[Any], like: Tensor) -> list[Tensor]:
        """The reference keeps no statistics: autograd recomputes, and their places hold empty tensors."""
        outputs = self.reference(*inputs)
        public = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        missing = len(self._outputs) - len(public)
        return [_fresh(o, inputs) for o in public] + [like.new_empty(0) for _ in range(missing)]

    def _run_backward(self, *args: Any) -> Any:
        *inputs, needs, backend = args
        if backend != "reference":
            return self._kernel(backend).backward(*inputs, needs)
        named = dict(zip(self._backward_inputs, inputs, strict=True))
        return self._reference_backward(named, needs)

    def _reference_backward(self, named: dict[str, Any], needs: Sequence[bool]) -> Any:
        wanted = [n for n, need in zip(self._differentiable, needs, strict=True) if need]
        if self._added is not None:
            named = named | {self._added: torch.zeros_like(named[f"grad_{self._outputs[0]}"])}
        if self._summed is not None:
            total = named[self._outputs[0]]
            named = named | dict(zip(self._summed, (total, torch.zeros_like(total)), strict=True))
        leaves: dict[str, Any] = {
            n: named[n].detach().requires_grad_(n in wanted) if isinstance(named.get(n), Tensor) else named.get(n)
            for n in self._inputs
        }
        with torch.enable_grad():
            outputs = self.reference(*leaves.values())
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        pairs = [
            (output, named[f"grad_{name}"])
            for name, output in zip(self._outputs, outputs, strict=False)
            if named.get(f"grad_{name}") is not None and output.requires_grad
        ]
        grads = (
            torch.autograd.grad(
                [o for o, _ in pairs], [leaves[n] for n in wanted], [g for _, g in pairs], allow_unused=True
            )
            if wanted
            else ()
        )
        found = dict(zip(wanted, grads, strict=True))
        lead = named[self._differentiable[0]]
        result = []
        for name in self._differentiable:
            grad = found.get(name)
            if name not in wanted:
                result.append(lead.new_empty(0))
            else:
                result.append(named[name].new_zeros(named[name].shape) if grad is None else grad.contiguous())
        return self._pack_grads(result)

    def _fake_forward(self, *args: Any) -> Any:
        *inputs, backend = args
        outputs = self._fake(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if backend == "reference":
            outputs[self._public :] = [inputs[0].new_empty(0) for _ in outputs[self._public :]]
        return self._pack(outputs)

    def _fake_backward(self, *args: Any) -> Any:
        *inputs, needs, _ = args
        named = dict(zip(self._backward_inputs, inputs, strict=True))
        if self._summed is not None:
            named[self._summed[0]] = named[self._outputs[0]]
        lead = named[self._differentiable[0]]
        return self._pack_grads(
            [
                torch.empty_like(named[name], memory_format=torch.contiguous_format) if need else lead.new_empty(0)
                for name, need in zip(self._differentiable, needs, strict=True)
            ]
        )

    @staticmethod
    def _pack_grads(grads: list[Tensor]) -> Any:
        return grads[0] if len(grads) == 1 else tuple(grads)

    def _make_function(self) -> type[torch.autograd.Function]:
        """The same formula for calls that nothing watches: autograd records it without PyTorch's dispatcher."""

        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            outputs = self._run_forward(*args)
            self._save(ctx, args, outputs)
            return outputs

        functions = {"forward": staticmethod(forward), "backward": staticmethod(self._differentiate)}
        return type(f"{self.name}_recorded", (torch.autograd.Function,), functions)

    def _save(self, ctx: Any, inputs: tuple, output: Any) -> None:
        outputs = (output,) if len(self._outputs) == 1 else output
        named = dict(zip(self._inputs, inputs, strict=False)) | dict(zip(self._outputs, outputs, strict=True))
        kept = {name: named[name] for name in self._backward_inputs if name in named}
        ctx.backend = inputs[-1]
        ctx.tensor_names = [name for name, value in kept.items() if isinstance(value, Tensor)]
        ctx.constants = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
        ctx.save_for_backward(*(kept[name] for name in ctx.tensor_names))
        ctx.mark_non_differentiable(*outputs[self._public :])

    def _differentiate(self, ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        named = dict(zip(ctx.tensor_names, ctx.saved_tensors, strict=True)) | ctx.constants
        named |= {f"grad_{name}": g for name, g in zip(self._outputs, grad_outputs, strict=True)}
        needed = dict(zip(self._inputs, ctx.needs_input_grad, strict=False))
        if self._summed is not None:
            needed[self._summed[0]] = any(needed[name] for name in self._summed)
        needs = [needed[name] for name in self._differentiable]
        found = {self._added: grad_outputs[0]} if self._added is not None and needed[self._added] else {}
        if any(needs):
            with torch.no_grad():
                inputs = [named[name] for name in self._backward_inputs]
                run = self._run_backward if _is_unwatched(inputs) else self._backward_op
                grads = run(*inputs, needs, ctx.backend)
            grads = (grads,) if isinstance(grads, Tensor) else grads
            if torch.is_grad_enabled():
                sources = (*ctx.saved_tensors, *(g for g in grad_outputs if g is not None))
                grads = _OnceOnly.apply(self.name, len(grads), *grads, *sources)
            found |= {n: g for n, g, need in zip(self._differentiable, grads, needs, strict=True) if need}
            if self._summed is not None:
                found |= {name: found.get(self._summed[0]) for name in self._summed}
        return *(found.get(name) for name in self._inputs), *(None for _ in ctx.needs_input_grad[len(self._inputs) :])


class _OnceOnly(torch.autograd.Function):
    """Hands gradients on as they are under `create_graph`; differentiating them again raises, never gives zeros."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first `count` tensors; the others are what they were computed from."""
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError(
            f"mra::{ctx.name} has no second derivative; compute it inside mra_kernels.use_backend('reference')"
        )


def _fresh(output: Tensor, inputs: Sequence[Any]) -> Tensor:
    """A functional op returns contiguous memory of its own."""
    shared = any(
        isinstance(i, Tensor) and i.untyped_storage()._cdata == output.untyped_storage()._cdata for i in inputs
    )
    return output.clone(memory_format=torch.contiguous_format) if shared else output.contiguous()


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple) -> None:
    """Raises unless `tensor` has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, but must have {expected}")


def _is_unwatched(args: Sequence[Any]) -> bool:
    """Whether nothing must see the op itself: no compiler, tracer, transform, mode, profiler or tensor subclass.

    Then its kernel is called without PyTorch's dispatcher, which takes longer than launching it on a GPU does.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
        and not torch.autograd._profiler_enabled()
        and all(type(a) in (Tensor, Parameter) for a in args if isinstance(a, Tensor))
    )


def check_map(op: str, name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` is a channels-last map [B, H, W, C] with at least one row, column and channel."""
    if tensor.dim() != 4:
        raise ValueError(f"{op}: {name} must be a map [B, H, W, C], but has shape {tuple(tensor.shape)}")
    if tensor.shape[1] == 0 or tensor.shape[2] == 0 or tensor.shape[3] == 0:
        raise ValueError(f"{op}: {name} is empty inside a picture: shape {tuple(tensor.shape)}; only B may be 0")
