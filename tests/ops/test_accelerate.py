"""torch_ext.accelerate(): what it routes, what it leaves alone, and that nothing of it stays."""

from __future__ import annotations

import gc
import importlib
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ext
from tests.ops import reference

BF16 = torch.bfloat16
ROUTED = ("linear", "matmul", "mm", "bmm", "addmm")

# The attribute of this name in the package is the function.
module = importlib.import_module("torch_ext.accelerate")


def routes_products() -> bool:
    return bool(torch_ext.isa_report()["linear"] == "torch_ext")


def tables() -> list[str]:
    """The dispatcher's tables of the ops that are routed."""
    return [torch._C._dispatch_dump(f"aten::{name}") for name in ROUTED]


def calls(function: Callable[[], Any]) -> Counter[str]:
    """How often each op of ours ran, as PyTorch's profiler saw it."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return Counter(
        event.name.removeprefix("torch_ext::")
        for event in profile.function_events
        if event.name.startswith("torch_ext::") and "fingerprint" not in event.name
    )


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = None if module._routes else tables()
    yield
    assert not module._enabled
    if threading.active_count() == 1:
        # Where the last one ended beside other threads the kernels are still there. With none they go.
        torch_ext.accelerate().disable()
        assert module._routes is None
        assert before is None or tables() == before
    elif module._routes:  # torch.compile leaves threads behind
        assert not module._routes.active
        assert not module._routes._packed


@pytest.fixture
def layer(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(24, 13, dtype=BF16)


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 24, generator=generator).bfloat16()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear(layer: nn.Linear, generator: torch.Generator, mode: Callable[[], Any]) -> None:
    without = nn.Linear(24, 13, bias=False, dtype=BF16)
    with mode():
        for shape in ((24,), (5, 24), (2, 3, 24), (0, 24), (1, 1, 1, 24)):
            x = torch.randn(shape, generator=generator).bfloat16()
            assert not calls(lambda x=x: layer(x))
            with torch_ext.accelerate():
                for linear in (layer, without):
                    assert calls(lambda linear=linear, x=x: linear(x))["linear"] == 1
                    actual = linear(x)
                    assert actual.dtype == BF16
                    reference.linear(x, linear.weight, linear.bias).check(actual, str(shape))
                    assert torch.equal(actual, F.linear(x, linear.weight, linear.bias))


def test_linear_without_modes(layer: nn.Linear, x: Tensor) -> None:
    """Gradients are enabled, but nothing requires any."""
    layer.requires_grad_(False)
    with torch_ext.accelerate():
        assert calls(lambda: layer(x)) == {"pack_linear_weight": 1, "linear": 1}
        assert not layer(x).requires_grad


def products(generator: torch.Generator) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    return {
        "torch.matmul": (torch.matmul, (rand(5, 24), rand(24, 13))),
        "@": (lambda a, b: a @ b, (rand(2, 3, 5, 8), rand(2, 3, 9, 8).transpose(-1, -2))),
        "vector": (torch.matmul, (rand(24), rand(24, 13))),
        "torch.mm": (torch.mm, (rand(5, 24), rand(13, 24).T)),
        "torch.bmm": (torch.bmm, (rand(3, 5, 24), rand(3, 24, 13))),
        "torch.addmm": (torch.addmm, (rand(13), rand(5, 24), rand(24, 13))),
        "view as weight": (F.linear, (rand(5, 24), rand(24, 13).T, rand(13))),
    }


@pytest.mark.parametrize("name", products(torch.Generator()))
def test_products(generator: torch.Generator, name: str) -> None:
    function, operands = products(generator)[name]
    expected = function(*(operand.double() for operand in operands))
    plain = function(*operands)
    with torch_ext.accelerate():
        seen = calls(lambda: function(*operands))
        actual = function(*operands)
    assert sum(seen.values()) == (1 if routes_products() else 0), seen
    assert "linear" not in seen
    assert (actual.shape, actual.dtype, actual.stride()) == (plain.shape, plain.dtype, plain.stride())
    a, b = operands[-2:] if name != "view as weight" else (operands[0], operands[1].T)
    bias = operands[0] if name == "torch.addmm" else operands[2] if name == "view as weight" else None
    bounded = reference.addmm(bias, a, b)
    assert torch.equal(bounded.exact, expected) or torch.allclose(bounded.exact, expected)
    bounded.check(actual, name)


def test_addmm_with_factors(generator: torch.Generator) -> None:
    bias, a, b = (torch.randn(*s, generator=generator).bfloat16() for s in ((5, 13), (5, 24), (24, 13)))
    with torch_ext.accelerate():
        actual = torch.addmm(bias, a, b, beta=2, alpha=0.5)
    reference.addmm(bias, a, b, 2, 0.5).check(actual, "addmm")


def left_alone(layer: nn.Linear, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Calls whose results must be PyTorch's to the bit."""
    wide = nn.Linear(24, 13)
    half = layer.weight.detach().half()
    weight = layer.weight.detach()
    subclass = x.as_subclass(type("Subclass", (Tensor,), {}))

    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def autocast() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
            return wide(x.float())

    def under_mode() -> list[Any]:
        with torch.no_grad(), Mode() as mode:
            return [F.linear(x, weight), mode.seen]

    def dual() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(F.linear(forward_ad.make_dual(x, x + 1), weight)))

    def backward() -> list[Tensor]:
        layer.zero_grad()
        layer(x).square().sum().backward()
        return [parameter.grad for parameter in layer.parameters()]

    return {
        "fp32": lambda: wide(x.float()),
        "fp32 product": lambda: x.float() @ x.float().T,
        "fp16": lambda: F.linear(x.half(), half),
        "fp16 products": lambda: (torch.mm(x.half(), half.T), torch.bmm(x.half()[None], half.T[None])),
        "fp64 addmm": lambda: torch.addmm(x[0, :5].double(), x.double(), x.double().T, alpha=3, beta=2),
        "integers": lambda: (x.long() @ x.long().T, torch.addmm(x.long()[:, :5], x.long(), x.long().T, beta=3)),
        "subclass": lambda: F.linear(subclass, weight),
        "sparse": lambda: torch.mm(x.to_sparse(), x.T),
        "requires grad": lambda: layer(x),
        "backward": backward,
        "autocast": autocast,
        "dispatch mode": under_mode,
        "dual numbers": dual,
        "vmap": lambda: torch.func.vmap(lambda row: F.linear(row, weight))(x.float().bfloat16()),
        "gradient transform": lambda: torch.func.grad(lambda t: F.linear(t, weight).float().sum())(x),
        "forward transform": lambda: torch.func.jvp(lambda t: F.linear(t, weight), (x,), (x,)),
    }


# These end in products of plain tensors, which may be ours; what they see and return is as before.
INNER = {"dispatch mode", "vmap", "gradient transform", "forward transform"}


# Transforms and dispatch modes are Python of torch, which takes minutes to import under emulation.
LEFT_ALONE = [
    pytest.param(name, marks=[pytest.mark.anywhere] if name in {"gradient transform", "dispatch mode"} else [])
    for name in left_alone(nn.Linear(24, 13, dtype=BF16), torch.ones(5, 24, dtype=BF16))
]


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(layer: nn.Linear, x: Tensor, name: str) -> None:
    function = left_alone(layer, x)[name]

    def results() -> list[Any]:
        value = function()
        return [value] if isinstance(value, Tensor) else [*value]

    expected = [value.clone() if isinstance(value, Tensor) else value for value in results()]
    with torch_ext.accelerate():
        actual = results()
        if name not in INNER:
            assert not calls(function)
    for one, other in zip(actual, expected, strict=True):
        assert type(one) is type(other)
        if not isinstance(one, Tensor):
            assert one == other
            continue
        assert (one.dtype, one.requires_grad, one.layout) == (other.dtype, other.requires_grad, other.layout)
        if name in INNER:
            torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(one, other)


def test_errors_are_those_of_torch(layer: nn.Linear, x: Tensor) -> None:
    weight = layer.weight.detach()
    wrong: list[Callable[[], Tensor]] = [
        lambda: F.linear(x[:, :5], weight),
        lambda: F.linear(x, weight.float()),
        lambda: F.linear(x, weight, x[0]),
        lambda: torch.mm(x, weight),
        lambda: torch.mm(x, x[0]),
        lambda: torch.bmm(x, weight),
        lambda: torch.addmm(x, x, weight.T),
        lambda: torch.addmm(x[:, :13], x.float(), weight.T),
        lambda: torch.matmul(x, weight),
        lambda: torch.matmul(x.expand(2, 5, 24), weight.T.expand(3, 24, 13)),
        lambda: torch.matmul(x, torch.tensor(1, dtype=BF16)),
    ]

    def message(function: Callable[[], Tensor]) -> str:
        with pytest.raises((RuntimeError, IndexError)) as error:
            function()
        return str(error.value)

    expected = [message(function) for function in wrong]
    with torch_ext.accelerate():
        assert [message(function) for function in wrong] == expected


@pytest.mark.anywhere
def test_training_is_unchanged(seed: int, x: Tensor) -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4)).to(BF16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            ((model(x) @ model(x).T).square().mean()).backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = train()
    with torch_ext.accelerate():
        assert not calls(train)
        actual = train()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_weights_are_packed_once(layer: nn.Linear, x: Tensor) -> None:
    with torch.no_grad(), torch_ext.accelerate():
        assert calls(lambda: [layer(x) for _ in range(3)]) == {"pack_linear_weight": 1, "linear": 3}
        twin = nn.Linear(24, 13, dtype=BF16)
        twin.weight = layer.weight
        assert calls(lambda: twin(x)) == {"linear": 1}


def test_a_changed_weight_is_packed_again(layer: nn.Linear, x: Tensor) -> None:
    def scale_view() -> None:
        layer.weight.T[3:] *= 2

    def write_through_data() -> None:
        layer.weight.data.mul_(3)

    def swap_data() -> None:
        layer.weight.data = torch.randn(13, 24).bfloat16()

    def swap_parameter() -> None:
        layer.weight = nn.Parameter(torch.randn(13, 24).bfloat16())

    def load() -> None:
        layer.load_state_dict(nn.Linear(24, 13).state_dict())

    def transpose() -> None:
        layer.weight.data = torch.randn(24, 13).bfloat16().T

    with torch.no_grad(), torch_ext.accelerate():
        layer(x)
        for change in (scale_view, write_through_data, swap_data, swap_parameter, load, transpose):
            change()
            assert calls(lambda: layer(x)) == {"pack_linear_weight": 1, "linear": 1}, change.__name__
            reference.linear(x, layer.weight, layer.bias).check(layer(x), change.__name__)
            assert len(module._routes._packed) == 1


def test_packed_weights_are_freed(x: Tensor) -> None:
    with torch.no_grad():
        with torch_ext.accelerate():
            layers = [nn.Linear(24, 13, dtype=BF16) for _ in range(3)]
            for one in layers:
                one(x)
            held = [weakref.ref(entry.packed) for entry in module._routes._packed.values()]
            assert len(held) == 3
            del one, layers[1]
            gc.collect()
            assert [ref() is None for ref in held] == [False, True, False]
            for _ in range(3):
                F.linear(x, torch.randn(13, 24).bfloat16())  # dies after the call
            assert len(module._routes._packed) == 2
        gc.collect()
        assert all(ref() is None for ref in held)
        assert len(layers) == 2


def test_weights_without_version_are_not_kept(x: Tensor) -> None:
    with torch_ext.accelerate(), torch.inference_mode():
        weight = torch.randn(13, 24).bfloat16()
        assert weight.is_inference()
        for _ in range(2):
            reference.linear(x, weight).check(F.linear(x, weight), "inference tensor")
            weight.mul_(2)
        assert not module._routes._packed


def test_handles_count(layer: nn.Linear, x: Tensor) -> None:
    def routed() -> bool:
        with torch.no_grad():
            return bool(calls(lambda: layer(x))["linear"])

    assert not routed()
    first = torch_ext.accelerate()
    assert first.enabled
    assert "enabled" in repr(first)
    assert routed()
    with torch_ext.accelerate() as second:
        assert second is not first
        first.disable()
        first.disable()
        assert routed()
        with torch_ext.accelerate():
            assert routed()
        assert routed()
    assert not first.enabled
    assert not second.enabled
    assert "disabled" in repr(second)
    assert not routed()
    second.disable()
    with pytest.raises(KeyError), torch_ext.accelerate() as third:  # noqa: PT012
        assert routed()
        raise KeyError
    assert not third.enabled
    assert not routed()


def test_threads(layer: nn.Linear, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing holds for threads that are there already, and handles may come and go in all of them."""
    expected = reference.linear(x, layer.weight.detach(), layer.bias.detach())
    where: Counter[str] = Counter()
    original = module._linear

    def counted(*args: Any) -> Tensor:
        where[threading.current_thread().name] += 1
        return original(*args)

    monkeypatch.setattr(module, "_linear", counted)
    errors: list[BaseException] = []
    started = threading.Barrier(5)
    enabled = threading.Event()

    def work(switches: bool) -> None:
        try:
            started.wait(60)
            enabled.wait(60)
            with torch.no_grad():
                for _ in range(100):
                    if switches:
                        with torch_ext.accelerate():
                            expected.check(layer(x), "linear")
                    else:
                        expected.check(layer(x), "linear")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i % 2 == 1,), name=str(i)) for i in range(4)]
    for thread in threads:
        thread.start()
    started.wait(60)
    with torch_ext.accelerate():
        enabled.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert where == {str(i): 100 for i in range(4)}
    # And where nothing else keeps routing on.
    threads = [threading.Thread(target=work, args=(True,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait(60)
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.anywhere
def test_switching_beside_threads_that_compute(layer: nn.Linear, x: Tensor) -> None:
    """Not even a thread that has nothing to do with it is disturbed, once the kernels are there."""
    expected = reference.linear(x, layer.weight.detach(), layer.bias.detach())
    wide = nn.Linear(x.shape[1], 5)
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(function: Callable[[], object]) -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    function()
        except BaseException as error:
            errors.append(error)

    functions = (lambda: expected.check(layer(x), "linear"), lambda: x @ x.T, lambda: wide(x.float()) @ wide.weight)
    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    handle = torch_ext.accelerate()
    for thread in threads:
        thread.start()
    for _ in range(300):
        handle.disable()
        assert not module._routes.active
        time.sleep(0.0005)
        handle = torch_ext.accelerate()
        time.sleep(0.0005)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    handle.disable()


@pytest.mark.parametrize("product", [F.linear, torch.matmul, torch.mm])
def test_others_run_while_torch_computes(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What is not routed computes without Python's lock, as it does without accelerate()."""
    ticks = 0
    stop = False

    def tick() -> None:
        nonlocal ticks
        while not stop:
            ticks += 1
            time.sleep(0.001)

    with torch_ext.accelerate(), torch.no_grad():
        thread = threading.Thread(target=tick)
        thread.start()
        try:
            size, elapsed_s, counted = 128, 0.0, 0
            while elapsed_s < 1 and counted <= 10:
                size *= 2
                x = torch.ones(size, size)
                ticks, start = 0, time.monotonic()
                product(x, x)
                elapsed_s, counted = time.monotonic() - start, ticks
        finally:
            stop = True
            thread.join()
    # Up to 1,000 in a second; with the lock held, those of the moments before and after, however long it takes.
    assert counted > 10


@pytest.mark.compile
def test_compiled_code_is_that_of_torch(layer: nn.Linear, x: Tensor) -> None:
    def function(x: Tensor) -> Tensor:
        return (layer(x) @ layer.weight).relu()

    with torch.no_grad():
        expected = torch.compile(function, fullgraph=True)(x)
        torch.compiler.reset()
        with torch_ext.accelerate():
            compiled = torch.compile(function, fullgraph=True)
            assert torch.equal(compiled(x), expected)
            assert not calls(lambda: compiled(x))
        assert torch.equal(compiled(x), expected)


@pytest.mark.compile
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traces_are_those_of_torch(layer: nn.Linear, x: Tensor, mode: str) -> None:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = F.linear(x, weight, bias)
        return torch.bmm((hidden @ weight)[None], x.T[None]) @ torch.addmm(x[0, :5], x, x.T) @ torch.mm(x, x.T)

    def trace() -> str:
        return str(make_fx(function, tracing_mode=mode)(x, layer.weight.detach(), layer.bias.detach()).code)

    with torch.no_grad():
        expected = trace()
        assert "mm" in expected
        with torch_ext.accelerate():
            assert trace() == expected
            rows = {0: torch.export.Dim("rows", min=2, max=100)}
            export = torch.export.export(layer, (x,), dynamic_shapes=(rows,)).graph_module.code
        assert export == torch.export.export(layer, (x,), dynamic_shapes=(rows,)).graph_module.code


@pytest.mark.needs_transformers
def test_bert(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
    )
    model = transformers.BertModel(config).to(BF16).eval()
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    batch = {
        "input_ids": torch.randint(0, 100, (3, 11)),
        "attention_mask": torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 2 + [0] * 9]),
    }

    def run() -> Tensor:
        return model(**batch).last_hidden_state

    with torch.inference_mode():
        before = run()
        with torch_ext.accelerate():
            seen = calls(run)
            accelerated = run()
        assert seen["linear"] == seen["pack_linear_weight"] == len(layers)
        assert not calls(run)
        assert torch.equal(run(), before)
    similarity = F.cosine_similarity(accelerated.double(), before.double(), dim=-1)
    assert similarity.min() > 0.999
    # The rounding errors of both, around what fp32 gives.
    with torch.inference_mode():
        exact = model.float()(**batch).last_hidden_state
    error, error_before = (accelerated - exact).abs().max(), (before - exact).abs().max()
    assert error <= 2 * error_before + 2**-7
    assert all(parameter.requires_grad for parameter in model.parameters())
