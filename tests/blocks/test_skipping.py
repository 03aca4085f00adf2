"""Skipping leaves no trace whatever else is done to a model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from tiny_models import build, output
from torch import nn

from entrecipes.blocks.stack import BlockStack
from entrecipes.errors import UserError


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """What stands in each module's dictionary, hooks' chains too; compared by identity of what they hold."""
    chains = [
        vars(link) for m in model.modules() for link in getattr(getattr(m, "_diffusers_hook", None), "_fn_refs", ())
    ]
    return [{key: id(value) for key, value in held.items()} for held in [vars(m) for m in model.modules()] + chains]


@pytest.fixture(params=["dit", "sd3", "flux"])
def tiny(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    return build(request.param)


def test_skipping_leaves_no_trace(tiny) -> None:
    model, inputs = tiny
    stack, full, before, keys = BlockStack(model), output(model, inputs), attributes(model), list(model.state_dict())
    with stack.skipped(1, 2):
        assert list(model.state_dict()) == keys
        assert not torch.equal(output(model, inputs), full)
    assert attributes(model) == before and torch.equal(output(model, inputs), full)
    with pytest.raises(RuntimeError, match="in the middle"), stack.skipped(1), stack.recorded():
        raise RuntimeError("in the middle")
    assert attributes(model) == before and list(model.state_dict()) == keys
    with stack.skipped():
        assert torch.equal(output(model, inputs), full)


def test_contexts_nest(tiny) -> None:
    model, inputs = tiny
    stack = BlockStack(model)
    outputs = {}
    for gone in ((1,), (1, 2)):
        with stack.skipped(*gone):
            outputs[gone] = output(model, inputs)
    with stack.skipped(1):
        with stack.recorded() as calls:
            output(model, inputs)
        with stack.skipped(2, calls=calls), stack.skipped(1):
            assert torch.equal(output(model, inputs), outputs[1, 2])
        assert torch.equal(output(model, inputs), outputs[(1,)])


def test_the_prefix_is_not_computed_again(tiny) -> None:
    model, inputs = tiny
    stack = BlockStack(model)
    with stack.recorded() as calls:
        output(model, inputs)
    with stack.skipped(2):
        expected = output(model, inputs)
    for module in (*stack.modules(0), *stack.modules(1), *stack.modules(2)):
        for parameter in module.attn.parameters() if hasattr(module, "attn") else module.ff.parameters():
            parameter.data.fill_(float("nan"))
    with stack.skipped(2, calls=calls):
        assert torch.equal(output(model, inputs), expected)


def test_a_copy_made_within_is_refused_and_one_made_after_is_its_own(tiny) -> None:
    model, inputs = tiny
    stack, full = BlockStack(model), output(model, inputs)
    with stack.skipped(1):
        with pytest.raises(UserError, match="can't be copied while"):
            copy.deepcopy(model)
        with pytest.raises(UserError, match="can't be copied while"):
            pickle.dumps(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.mul_(0.5)
    assert not torch.equal(output(twin, inputs), full) and torch.equal(output(model, inputs), full)


def test_gradient_checkpointing_gives_the_same_gradients(tiny) -> None:
    model, inputs = tiny
    stack = BlockStack(model)
    model.train()
    gradients = {}
    for checkpointed in (False, True):
        (model.enable_gradient_checkpointing if checkpointed else model.disable_gradient_checkpointing)()
        model.zero_grad()
        with torch.random.fork_rng(), stack.skipped(1):
            torch.manual_seed(0)  # DiT drops labels at random
            loss = model(**inputs, return_dict=False)[0].square().mean()
        loss.backward()  # recomputes blocks after the context has gone
        gradients[checkpointed] = {name: parameter.grad for name, parameter in model.named_parameters()}
    own = tuple(f"{path}." for path in stack.blocks[1].paths)
    assert all((grad is None) for name, grad in gradients[True].items() if name.startswith(own))
    assert all(grad is not None for name, grad in gradients[True].items() if name.startswith(stack.blocks[0].paths[0]))
    for name, grad in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_skip_and_lose_blocks(backend: str) -> None:
    model, inputs = build("pixart")
    stack = BlockStack(model)
    with stack.skipped(1):
        expected = output(model, inputs)
    if backend == "eager":
        compiled = torch.compile(model, backend=backend)
        assert BlockStack(compiled).model is model
    else:
        model.compile(backend=backend)
        compiled = model
    full = output(compiled, inputs)
    with stack.skipped(1):
        assert torch.equal(output(compiled, inputs), expected)
    with stack.recorded() as calls:
        output(compiled, inputs)
    assert len(calls) == 3
    assert torch.equal(output(compiled, inputs), full)
    stack.remove([1])
    torch.testing.assert_close(output(compiled, inputs), expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()


class Counting(ModelHook):
    """Counts the calls of its module."""

    before = after = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.before += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.after += 1
        return output


class Replacing(Counting):
    """As diffusers' caches: decides itself whether the block is computed."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Counting, Replacing])
def test_hooks_of_diffusers_go_on_around_a_skipped_block(kind: type[Counting]) -> None:
    model, inputs = build("flux")
    stack, full = BlockStack(model), output(model, inputs)
    with stack.skipped(1, 2):
        skipped = output(model, inputs)
    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1])
    registry.register_hook(hook := kind(), "counting")
    apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2
    )
    before = attributes(model)
    with stack.skipped(1, 2):
        assert torch.equal(output(model, inputs), skipped)
        assert hook.before == hook.after == 1
    assert attributes(model) == before and torch.equal(output(model, inputs), full)
    registry.remove_hook("counting")
    assert torch.equal(output(model, inputs), full)


def test_text_and_image_of_unequal_length() -> None:
    for family in ("sd3", "flux", "qwen"):
        model, inputs = build(family)
        stack = BlockStack(model)
        short = {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :3]}
        short |= {key: inputs[key][:3] for key in ("txt_ids",) if key in inputs}
        short |= {key: inputs[key][:, :3] for key in ("encoder_hidden_states_mask",) if key in inputs}
        with stack.skipped(0), stack.recorded() as calls:
            skipped = output(model, inputs | short)
        assert [tensor.shape[1] for tensor in stack.hidden_states(1, calls)] == [4, 4]
        stack.remove([0])
        assert torch.equal(output(model, inputs | short), skipped)
