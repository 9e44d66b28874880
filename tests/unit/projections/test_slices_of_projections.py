"""Frames, projectors, metrics and actions: identities, and the same on any number of ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from forgetscale.ops.neighbours import alignment_matrix
from forgetscale.projections import (
    Anchor,
    Complement,
    DiagonalMetric,
    FrameMetric,
    Guard,
    IdentityMetric,
    LeftFrame,
    MaskFrame,
    Onto,
    Place,
    RightFrame,
    TwoSidedComplement,
    TwoSidedFrame,
    VectorFrame,
    add_penalty_,
    find_cut_rows,
    floats_per_step,
    measure,
    project_,
    shrink_,
)

D = torch.float64
SHAPES = [(7, 5), (4, 9), (1, 6), (11,)]
WORLDS = [1, 2, 3, 4]


class Ranks:
    """Threads in lockstep: ``all_reduce`` waits for all and returns the sum."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.floats = 0
        self._barrier = threading.Barrier(size)
        self._parts: list[Tensor] = [torch.empty(0)] * size

    def _reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(value: Tensor) -> Tensor:
            self._parts[rank] = value
            self._barrier.wait()
            total = torch.stack(self._parts).sum(0)
            self._barrier.wait()
            if rank == 0:
                self.floats += value.numel()
            return total

        return all_reduce

    def run(self, work: Callable[[int, Callable[[Tensor], Tensor]], object]) -> list:
        with ThreadPoolExecutor(self.size) as pool:
            waiting = [pool.submit(work, rank, self._reduce(rank)) for rank in range(self.size)]
            return [future.result(timeout=30) for future in waiting]


def places(shape: tuple[int, ...], size: int) -> list[Place]:
    """Slices as ZeRO-3 cuts them; the last ranks may own less, or nothing."""
    numel = math.prod(shape)
    part = -(-numel // size)
    starts = [min(rank * part, numel) for rank in range(size)]
    return [Place(shape, start, min(part, numel - start)) for start in starts]


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=D, generator=generator))[0]


def cut(flat: Tensor, place: Place) -> Tensor:
    return flat[place.start : place.start + place.length]


def make_frame(kind: str, place: Place, all_reduce):
    height, width = place.height, place.width
    left, right = orthonormal(height, min(2, height), 1), orthonormal(width, 3, 2)
    if kind == "vector":
        return VectorFrame(place, cut(orthonormal(height * width, 3, 3), place))
    if kind == "left":
        return LeftFrame(place, left)
    if kind == "right":
        return RightFrame(place, right, find_cut_rows(place, all_reduce))
    if kind == "two_sided":
        return TwoSidedFrame(place, left, right)
    return MaskFrame(place, cut(torch.arange(height * width) % 3 == 1, place))


def make_projector(kind: str, place: Place, all_reduce):
    if kind == "oplora":
        left = orthonormal(place.height, min(2, place.height), 1)
        right = orthonormal(place.width, 3, 2)
        return TwoSidedComplement(place, left, right, find_cut_rows(place, all_reduce))
    name = kind.removeprefix("not_")
    found = Onto(make_frame(name, place, all_reduce))
    return Complement(found) if kind.startswith("not_") else found


FRAMES = ["vector", "left", "right", "two_sided", "mask"]
PROJECTORS = [*FRAMES, *(f"not_{kind}" for kind in FRAMES), "oplora"]


def apply(kind: str, shape: tuple[int, ...], x: Tensor, size: int) -> tuple[Tensor, float]:
    """Return ``P x`` and its energy, cut over ``size`` ranks."""
    cuts = places(shape, size)
    ranks = Ranks(size)

    def work(rank: int, all_reduce):
        projector = make_projector(kind, cuts[rank], all_reduce)
        mine = cut(x, cuts[rank])
        sketch = projector.sketch(mine)
        assert sketch.numel() == projector.communication.floats
        total = all_reduce(sketch)
        square = all_reduce(mine.square().sum().view(1))[0]
        return projector.apply(mine, total), float(projector.energy(total, square))

    parts = ranks.run(work)
    return torch.cat([part for part, _ in parts]), parts[0][1]


def change(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(
        math.prod(shape), dtype=D, generator=torch.Generator().manual_seed(seed + 50)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PROJECTORS)
class TestProjectors:
    def test_identities(self, kind, shape):
        x, y = change(shape), change(shape, 1)
        once, energy = apply(kind, shape, x, 1)
        assert torch.allclose(apply(kind, shape, once, 1)[0], once, atol=1e-13)
        other, _ = apply(kind, shape, y, 1)
        assert float(once @ y) == pytest.approx(float(x @ other), abs=1e-12)
        assert energy == pytest.approx(float(once @ once), abs=1e-12)
        assert float(once @ (x - once)) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("size", WORLDS[1:])
    def test_slices_equal_the_whole(self, kind, shape, size):
        x = change(shape)
        (whole, one), (parts, many) = apply(kind, shape, x, 1), apply(kind, shape, x, size)
        assert torch.allclose(parts, whole, atol=1e-13)
        assert many == pytest.approx(one, abs=1e-12)


@pytest.mark.parametrize("kind", ["left", "right", "vector", "two_sided", "oplora"])
def test_projectors_are_what_they_say(kind):
    shape = (7, 5)
    x = change(shape)
    left, right = orthonormal(7, 2, 1), orthonormal(5, 3, 2)
    dense = x.view(shape)
    of_left, of_right = left @ left.t(), right @ right.t()
    vector = orthonormal(35, 3, 3)
    expected = {
        "left": of_left @ dense,
        "right": dense @ of_right,
        "two_sided": of_left @ dense @ of_right,
        "vector": (vector @ (vector.t() @ x)).view(shape),
        "oplora": (torch.eye(7, dtype=D) - of_left) @ dense @ (torch.eye(5, dtype=D) - of_right),
    }[kind]
    assert torch.allclose(apply(kind, shape, x, 1)[0], expected.flatten(), atol=1e-13)


def test_communication_is_what_the_note_says():
    shape, m = (7, 5), 3
    for size in WORLDS:
        ranks = Ranks(size)
        cuts = places(shape, size)
        borders = {place.start // 5 for place in cuts[1:] if place.start % 5 and place.length}
        for rank, found in enumerate(ranks.run(lambda r, f, cuts=cuts: find_cut_rows(cuts[r], f))):
            assert set(found.tolist()) == borders and len(borders) <= size - 1
            frame = RightFrame(cuts[rank], orthonormal(5, m, 0), found)
            assert frame.communication.floats == m * (len(borders) + 1)
            assert frame.communication.kind == "border_rows"
    place = Place.whole(shape)
    assert VectorFrame(place, orthonormal(35, m, 0)).communication.floats == m
    assert LeftFrame(place, orthonormal(7, m, 0)).communication.floats == m * 5
    sides = TwoSidedFrame(place, orthonormal(7, 2, 0), orthonormal(5, m, 0))
    assert sides.communication.floats == 2 * m
    assert MaskFrame(place, torch.ones(35, dtype=torch.bool)).communication.kind == "local"


def make_metric(kind: str, place: Place, all_reduce):
    if kind == "identity":
        return IdentityMetric(0.7)
    if kind == "diagonal":
        numel = math.prod(place.shape)
        return DiagonalMetric(cut(torch.linspace(0, 2, numel, dtype=D), place), 1.3)
    outside = 0.4 if kind.endswith("+ridge") else 0.0
    frame = make_frame(kind.removesuffix("+ridge"), place, all_reduce)
    values = torch.linspace(0.5, 3, math.prod(frame.directions), dtype=D)
    return FrameMetric(frame, values.view(frame.directions), outside)


METRICS = ["identity", "diagonal", *FRAMES, *(f"{kind}+ridge" for kind in FRAMES)]


def evaluate(kind: str, shape: tuple[int, ...], x: Tensor, size: int, step: float = 0.3):
    """Return value, gradient and proximal point, cut over ``size`` ranks."""
    cuts = places(shape, size)

    def work(rank: int, all_reduce):
        metric = make_metric(kind, cuts[rank], all_reduce)
        mine = cut(x, cuts[rank])
        sketch = metric.sketch(mine)
        assert sketch.numel() == metric.communication.floats
        total = all_reduce(sketch)
        value = metric.value(total)
        return value, metric.gradient(mine, total), metric.prox(mine, total, step), metric.largest

    parts = Ranks(size).run(work)
    gradient, prox = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    return float(parts[0][0]), gradient, prox, max(part[3] for part in parts)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("kind", METRICS)
class TestMetrics:
    def test_values(self, kind, shape):
        assert evaluate(kind, shape, torch.zeros(math.prod(shape), dtype=D), 1)[0] == 0
        for seed in range(3):
            assert evaluate(kind, shape, change(shape, seed), 1)[0] >= 0

    def test_gradient_by_differences(self, kind, shape):
        x, direction = change(shape), change(shape, 9)
        _, gradient, _, _ = evaluate(kind, shape, x, 1)
        high, low = (evaluate(kind, shape, x + e * direction, 1)[0] for e in (1e-5, -1e-5))
        assert (high - low) / 2e-5 == pytest.approx(float(gradient @ direction), rel=1e-6)

    def test_prox_is_the_minimiser(self, kind, shape):
        x, step = change(shape), 0.3
        _, _, point, _ = evaluate(kind, shape, x, 1, step)
        _, gradient, _, _ = evaluate(kind, shape, point, 1)
        assert torch.allclose(gradient + (point - x) / step, torch.zeros_like(x), atol=1e-12)

    def test_largest_bounds_the_form(self, kind, shape):
        x = change(shape)
        value, _, _, largest = evaluate(kind, shape, x, 1)
        assert value <= largest * float(x @ x) * (1 + 1e-12)

    @pytest.mark.parametrize("size", WORLDS[1:])
    def test_slices_equal_the_whole(self, kind, shape, size):
        x = change(shape)
        one, many = evaluate(kind, shape, x, 1), evaluate(kind, shape, x, size)
        assert many[0] == pytest.approx(one[0], rel=1e-12, abs=1e-14)
        assert torch.allclose(many[1], one[1], atol=1e-13)
        assert torch.allclose(many[2], one[2], atol=1e-13)


class TestActions:
    SHAPE = (7, 5)

    def guards(self, place: Place, all_reduce, source: Tensor, shared: bool = True):
        frame = make_frame("left", place, all_reduce)
        other = frame if shared else make_frame("left", place, all_reduce)
        values = torch.tensor([2.0, 0.5], dtype=D)
        anchor = Anchor(cut(source, place).clone())
        return [Guard("w", place, anchor, FrameMetric(frame, values), Onto(other))]

    @pytest.mark.parametrize("size", WORLDS)
    def test_all_of_them(self, size):
        source, weight, task = (change(self.SHAPE, seed) for seed in (1, 2, 3))
        cuts = places(self.SHAPE, size)
        left = orthonormal(7, 2, 1)
        x = (weight - source).view(self.SHAPE)
        inner = left.t() @ x
        values = torch.tensor([2.0, 0.5], dtype=D)
        value = float((values[:, None] * inner.square()).sum())
        pull = 2 * left @ (values[:, None] * inner)

        def work(rank: int, all_reduce):
            place = cuts[rank]
            guards = self.guards(place, all_reduce, source)
            param, grad = cut(weight, place).clone(), cut(task, place).clone()
            first = add_penalty_(guards, {"w": param}, {"w": grad}, all_reduce)
            shrunk, projected = param.clone(), param.clone()
            second = shrink_(guards, {"w": shrunk}, all_reduce, 0.3)
            third = project_(guards, {"w": projected}, all_reduce)
            after = measure(guards, {"w": projected}, all_reduce)
            return grad, shrunk, projected, first, second, third, after

        parts = Ranks(size).run(work)
        grad, shrunk, projected = (torch.cat([p[i] for p in parts]) for i in range(3))
        assert torch.allclose(grad, task + pull.flatten(), atol=1e-12)
        assert torch.allclose((projected - source).view(self.SHAPE), x - left @ inner, atol=1e-12)
        kept = left @ (inner / (1 + 0.6 * values[:, None]))
        assert torch.allclose((shrunk - source).view(self.SHAPE), x - left @ inner + kept)
        leak = float(inner.norm() / x.norm())
        for report in (part[i] for part in parts for i in (3, 4, 5)):
            assert report.value == pytest.approx(value)
            assert report.leak == pytest.approx(leak)
            assert report.norm == pytest.approx(float(x.norm()))
        for part in parts:
            assert part[3].pull == pytest.approx(float(pull.norm()))
            assert part[3].task_pull == pytest.approx(float(task.norm()))
            assert part[6].leak < 1e-12 and part[6].value < 1e-20

    def test_one_frame_travels_once(self):
        source, place = change(self.SHAPE), Place.whole(self.SHAPE)
        counts = {}
        for shared in (True, False):
            ranks = Ranks(1)

            def work(rank: int, all_reduce, shared=shared):
                guards = self.guards(place, all_reduce, source, shared)
                return floats_per_step(guards), measure(guards, {"w": 2 * source}, all_reduce)

            ((floats, report),) = ranks.run(work)
            assert ranks.floats == floats
            counts[shared] = floats, report.leak
        assert counts[True][0] == 2 * 5 + 1 and counts[False][0] == 4 * 5 + 1
        assert counts[True][1] == counts[False][1]

    def test_buckets(self, monkeypatch):
        monkeypatch.setattr("forgetscale.projections.guards.BUCKET_FLOATS", 12)
        source, place = change(self.SHAPE), Place.whole(self.SHAPE)
        sizes = []

        def all_reduce(value: Tensor) -> Tensor:
            sizes.append(value.numel())
            return value

        one = self.guards(place, all_reduce, source)[0]
        many = [Guard(f"w{i}", place, one.anchor, one.metric, one.projector) for i in range(3)]
        report = measure(many, {f"w{i}": 2 * source for i in range(3)}, all_reduce)
        assert sizes == [11, 11, 11]
        single = measure([one], {"w": 2 * source}, all_reduce)
        assert report.value == pytest.approx(3 * single.value)
        assert report.leak == pytest.approx(single.leak)

    def test_anchors(self):
        none, fixed = Anchor(), Anchor(torch.ones(3, dtype=torch.bfloat16))
        x = torch.tensor([1.5, 2.0, 3.0])
        assert torch.equal(none.change(x), x) and torch.equal(fixed.change(x), x - 1)
        target = torch.empty(3)
        fixed.put_(target, fixed.change(x))
        assert torch.equal(target, x)
        fixed.move_(x)
        assert fixed.values.dtype == torch.bfloat16 and not fixed.change(x).any()

    def test_nothing_to_guard(self):
        assert measure([], {}, lambda value: value).norm == 0.0


class TestNeighboursAreTheseObjects:
    """The worked example of SafeLoRA, AsFT and OPLoRA through frames."""

    DELTA = torch.tensor([[1.0, 3], [2, 6], [-1, -3]], dtype=D)
    PLACE = Place.whole((3, 2))

    def matrix(self, form: str):
        return alignment_matrix(torch.tensor([[1.0, 0], [1, 1], [0, 1]], dtype=D), form)

    def test_safelora(self):
        for form, expected in (
            ("published", [1.5, 4.5, 2, 6, 0.5, 1.5]),
            ("exact", [5 / 3, 5, 4 / 3, 4, -1 / 3, -1]),
        ):
            matrix = self.matrix(form)
            frame = LeftFrame(self.PLACE, matrix.basis)
            x = self.DELTA.flatten()
            found = frame.filter(x, frame.sketch(x), matrix.values)
            assert found.tolist() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize(("form", "value"), [("exact", 13.333333333), ("published", 25.0)])
    def test_asft(self, form, value):
        matrix = self.matrix(form)
        # (I - C)^2 is (1 - c_i)^2 inside the frame and 1 outside.
        metric = FrameMetric(
            LeftFrame(self.PLACE, matrix.basis), (1 - matrix.values).square(), outside=1.0
        )
        found = metric.value(metric.sketch(self.DELTA.flatten()))
        assert float(found) == pytest.approx(value, abs=1e-9)

    def test_oplora(self):
        left, right = torch.eye(3, dtype=D)[:, :1], torch.eye(2, dtype=D)[:, :1]
        none = torch.zeros(0, dtype=torch.int64)
        projector = TwoSidedComplement(self.PLACE, left, right, none)
        x = self.DELTA.flatten()
        assert projector.apply(x, projector.sketch(x)).tolist() == [0, 0, 0, 6, 0, -3]


def test_bad_input():
    place = Place.whole((3, 2))
    frame = LeftFrame(place, torch.eye(3)[:, :2])
    for make, sentence in (
        (lambda: VectorFrame(place, torch.zeros(5, 1)), "flattened matrix must have 6 rows"),
        (lambda: LeftFrame(place, torch.zeros(2, 1)), "output side must have 3 rows"),
        (lambda: MaskFrame(place, torch.ones(5, dtype=torch.bool)), "mask must be bool"),
        (lambda: FrameMetric(frame, torch.ones(3)), "one per direction"),
        (lambda: FrameMetric(frame, -torch.ones(2)), "values must be >= 0"),
        (lambda: DiagonalMetric(torch.tensor([-1.0]), 1.0), "diagonal metric must be >= 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()


def test_update_projection_confines_adam_and_gradient_projection_does_not():
    """The leak test and its negative control: 300 Adam steps on a rotated quadratic."""
    size, generator = 50, torch.Generator().manual_seed(0)
    place = Place.whole((5, 10))
    basis = orthonormal(size, 5, 4)
    projector = Onto(VectorFrame(place, basis))
    root = torch.randn(size, size, dtype=D, generator=generator) / 7
    target = torch.randn(size, dtype=D, generator=generator)
    leaks = {}
    for way in ("gradient", "update", "update+decay"):
        weight = torch.randn(size, dtype=D, generator=torch.Generator().manual_seed(8))
        source = weight.clone()
        guards = [Guard("w", place, Anchor(source.clone()), None, projector)]
        param = torch.nn.Parameter(weight)
        decay = 0.1 if way == "update+decay" else 0.0
        optimizer = torch.optim.AdamW([param], lr=1e-2, weight_decay=decay)
        for _ in range(300):
            grad = root.t() @ (root @ (param.detach() - target))
            if way == "gradient":
                grad = grad - projector.apply(grad, projector.sketch(grad))
            param.grad = grad
            optimizer.step()
            if way != "gradient":
                project_(guards, {"w": param.data}, lambda value: value)
        leaks[way] = measure(guards, {"w": param.data}, lambda value: value).leak
        assert float((param.data - source).norm()) > 0.5
    assert leaks["gradient"] > 0.05
    assert leaks["update"] < 1e-6 and leaks["update+decay"] < 1e-6


def test_rank_with_padding_only():
    """Five ranks, three elements: the last two own nothing."""
    shape = (1, 3)
    cuts = places(shape, 5)
    assert [place.length for place in cuts] == [1, 1, 1, 0, 0]
    assert cuts[-1].rows == range(0)
    x = change(shape)
    for kind in PROJECTORS:
        whole, parts = apply(kind, shape, x, 1)[0], apply(kind, shape, x, 5)[0]
        assert torch.allclose(parts, whole, atol=1e-13), kind
