"""SSU: statistics over real tokens, plans, and errors instead of fallbacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forgetscale.api import Batch
from forgetscale.config import DATA_SCORES, SCORES, SsuMethodConfig
from forgetscale.errors import ConfigError, DataError
from forgetscale.masks import load_plan, save_plan
from forgetscale.methods import METHODS
from forgetscale.methods.ssu.method import random_frozen
from forgetscale.methods.ssu.scores import column_scores_of, input_statistics, weight_norms
from forgetscale.methods.ssu.statistics import InputStatistics
from forgetscale.methods.ssu.targets import embedding_names, find_targets
from forgetscale.ops.importance import column_scores, select_frozen


def config(**settings) -> SsuMethodConfig:
    found = {"kind": "ssu", "score": "mag_l2", **settings}
    if found["score"] in DATA_SCORES:
        found["calibration"] = {"path": "unused", **found.get("calibration", {})}
    from forgetscale.config import validate_recipe

    recipe = {
        "run": {"name": "a", "output_dir": "o"},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "method": found,
        "train": {"num_steps": 1},
        "deepspeed": "x",
    }
    method = validate_recipe(recipe).method
    assert isinstance(method, SsuMethodConfig)
    return method


def plan_of(calibration, /, **settings):
    return METHODS["ssu"](config(**settings)).prepare(calibration)


def inputs_of(model, ids) -> dict[str, torch.Tensor]:
    """Return each module's real inputs, flattened over rows and positions, in fp64."""
    found = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: found.__setitem__(name, args[0].double().flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


class TestTargets:
    def test_body_without_embedding_and_head(self, body):
        found = {t.name: (t.module, t.shape, t.is_bias) for t in find_targets(body)}
        assert found == {
            "left.weight": ("left", (4, 6), False),
            "left.bias": ("left", (4,), True),
            "right.weight": ("right", (4, 6), False),
            "norm.weight": ("norm", (4,), False),
            "extra.weight": ("extra", (4, 4), False),
        }

    def test_names_with_embed_or_head_are_not_skipped(self, body):
        # The published code skips by substring; a body module may well be called so.
        body.multihead_mixer = nn.Linear(3, 3, bias=False)
        body.embedded = nn.Linear(3, 3, bias=False)
        names = [t.name for t in find_targets(body)]
        assert {"multihead_mixer.weight", "embedded.weight"} <= set(names)

    @pytest.mark.parametrize(
        "module", [nn.Conv1d(2, 2, 3, bias=False), nn.Bilinear(2, 2, 2, bias=False)]
    )
    def test_what_has_no_columns_is_refused(self, body, module):
        body.odd = module
        with pytest.raises(ConfigError, match=r"odd.weight .* is neither the matrix of a linear"):
            find_targets(body)

    def test_tied_head_is_named_once(self, body):
        assert embedding_names(body) == ["embed.weight", "lm_head.weight"]
        body.lm_head = nn.Linear(6, 11, bias=False)
        body.lm_head.weight = body.embed.weight
        assert embedding_names(body) == ["embed.weight"]


class TestStatistics:
    def test_real_tokens_only(self, calibration, body, ids):
        targets = find_targets(body)
        found = input_statistics(calibration, targets, config())
        assert calibration.passes == 3, "one pass serves all"
        for name, x in inputs_of(body, ids).items():
            if name == "lm_head":
                continue
            square = x.square()
            blocks = square.view(5, 7, -1).mean(1)
            recent = blocks[0]
            for new in blocks[1:]:
                recent = (recent + new) / 2
            exact = {
                "l2_norm": square.sum(0).sqrt(),
                "mean_square": square.mean(0),
                "recent_mean_square": recent,
            }
            assert set(found) == set(exact)
            for statistic, value in exact.items():
                assert torch.allclose(found[statistic][f"{name}.weight"], value, rtol=1e-5)

    def test_batches_of_filler_change_nothing(self, kit, body, batches):
        targets = find_targets(body)
        filler = Batch(torch.full((2, 7), 9), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
        for score in DATA_SCORES:
            plain, more = (
                column_scores_of(
                    kit.FakeCalibration(body, used), targets, [score], config(score=score)
                )
                for used in (batches, [*batches, filler])
            )
            assert all(torch.equal(plain[score][name], more[score][name]) for name in plain[score])

    def test_token_mean_not_mean_of_sequence_means(self):
        # Sequences [1, 1] and [3]: tokens weigh alike, so 11/3 and not (1 + 9) / 2.
        class One(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(1, 1, bias=False)

            def forward(self, ids):
                return self.layer(ids[..., None].float())

        model = One()
        statistics = InputStatistics({"layer": model.layer}, 2)
        for block, row in enumerate(([1, 1], [3])):
            batch = Batch(torch.tensor([row]), torch.ones(1), torch.tensor([block]))
            statistics.start(batch)
            model(batch.input_ids)
        statistics.close()
        mean = statistics.sums["layer"][0].item() / statistics.num_tokens
        assert mean == pytest.approx(3.6667, 1e-4)

    def test_hooks_are_removed(self, calibration, body):
        for score in DATA_SCORES:
            plan_of(calibration, score=score)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in body.modules())

    def test_bf16_activations_are_summed_wide(self, kit):
        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(1, 1, bias=False)

            def forward(self, ids):
                self.layer(torch.full((*ids.shape, 1), 1.0078125).bfloat16())

        model = Wide().bfloat16()
        statistics = InputStatistics({"layer": model.layer}, 12)
        batch = Batch(torch.zeros(4, 500, dtype=torch.int64), torch.ones(4), torch.arange(4))
        for _ in range(3):
            statistics.start(batch)
            with torch.no_grad():
                model(batch.input_ids)
        statistics.close()
        total = statistics.sums["layer"][0].item()
        assert total == pytest.approx(6000 * 1.0078125**2, rel=1e-6)

    def test_duplicated_data_change_no_choice(self, kit, body, batches):
        for score in ("paper", "official"):
            once = plan_of(kit.FakeCalibration(body, batches), score=score)
            twice = plan_of(kit.FakeCalibration(body, batches * 2), score=score)
            assert once.content_hash() == twice.content_hash()


class TestErrors:
    def test_a_module_that_never_runs(self, calibration, body):
        body.uses_extra = False
        for score in DATA_SCORES:
            with pytest.raises(DataError) as caught:
                plan_of(calibration, score=score)
            wanted = "ssu: extra never ran on the calibration data,"
            if score in ("fisher", "forgetscale"):
                wanted = "ssu: extra.weight got no gradient on the calibration data,"
            assert str(caught.value).startswith(wanted)
            assert "\n" not in str(caught.value)
        assert plan_of(calibration, score="mag_l1").columns

    def test_an_input_of_another_width(self, kit, batches):
        class Reshaping(kit.Body):
            def forward(self, ids):
                self.extra(torch.zeros(2, 3, 4))
                self.norm(torch.zeros(2, 4))
                self.left(torch.zeros(2, 3, 6))
                self.right.forward = lambda x: x
                self.right(torch.zeros(2, 3, 5))

        with pytest.raises(DataError, match="right has input width 5 .* expected input width 6"):
            plan_of(kit.FakeCalibration(Reshaping(), batches), score="paper")

    @pytest.mark.parametrize("score", DATA_SCORES)
    @pytest.mark.parametrize("weight", [0.0, None])
    def test_no_token(self, kit, body, batches, weight, score: str):
        blocks = torch.zeros(2, dtype=torch.int64)
        empty = [] if weight is None else [Batch(batches[0].input_ids, torch.zeros(2), blocks)]
        expected = "holds no token" if empty else "never ran|got no gradient"
        with pytest.raises(DataError, match=expected):
            plan_of(kit.FakeCalibration(body, empty), score=score)

    def test_a_failing_forward_is_not_swallowed(self, calibration, body):
        def fail(ids):
            raise RuntimeError("out of memory")

        body.forward = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            plan_of(calibration, score="paper")
        assert not any(m._forward_pre_hooks for m in body.modules())

    @pytest.mark.parametrize("score", DATA_SCORES)
    def test_not_finite_activations(self, calibration, body, score: str):
        with torch.no_grad():
            body.embed.weight[3] = float("inf")
        with pytest.raises(DataError, match=r"ssu: left(.weight)?\b.* not finite") as caught:
            plan_of(calibration, score=score)
        assert "\n" not in str(caught.value)

    def test_singular_hessian_names_the_module(self, calibration, body):
        with torch.no_grad():
            body.embed.weight.zero_()
        with pytest.raises(DataError, match="ssu: left cannot be scored by sgpt_true: .* singular"):
            plan_of(calibration, score="sgpt_true")

    def test_too_little_memory_for_one_matrix(self, calibration):
        with pytest.raises(ConfigError, match="is 100, but the inputs of left alone need 288"):
            plan_of(calibration, score="sgpt_true", calibration={"max_statistics_bytes": 100})


PER_MATRIX = [name for name in SCORES if name != "forgetscale"]


class TestPlans:
    @pytest.mark.parametrize("score", [name for name in PER_MATRIX if name != "rand"])
    def test_scores_are_kept_beside_the_plan(self, calibration, tmp_path, score: str):
        plan = plan_of(calibration, score=score, frozen_fraction=0.5)
        save_plan(tmp_path / "plan", plan)
        kept = load_plan(tmp_path / "plan")
        assert kept.content_hash() == plan.content_hash()
        assert set(kept.scores) == set(plan.columns)
        for name, index in kept.columns.items():
            assert kept.scores[name].dtype == torch.float32
            assert torch.equal(select_frozen(kept.scores[name], 0.5), index)
        (tmp_path / "plan" / "scores.safetensors").unlink()
        with pytest.raises(DataError, match="scores.safetensors"):
            load_plan(tmp_path / "plan")

    def test_random_columns_have_no_scores(self, calibration, tmp_path):
        save_plan(tmp_path / "plan", plan_of(calibration, score="rand"))
        assert not (tmp_path / "plan" / "scores.safetensors").exists()
        assert load_plan(tmp_path / "plan").scores == {}

    def test_several_scores_share_their_passes(self, calibration, body):
        targets = find_targets(body)
        names = [name for name in SCORES if name not in ("rand", "fisher", "forgetscale")]
        together = column_scores_of(calibration, targets, names, config(score="sgpt_true"))
        assert calibration.passes == 3
        for name in names:
            alone = column_scores_of(calibration, targets, [name], config(score="sgpt_true"))
            for target in targets:
                assert torch.equal(alone[name][target.name], together[name][target.name])

    def test_memory_bound_changes_passes_and_nothing_else(self, calibration):
        # left and right share a matrix of 6 x 6 numbers, extra has one of 4 x 4.
        whole = plan_of(calibration, score="sgpt_true")
        assert calibration.passes == 3
        bounded = plan_of(calibration, score="sgpt_true", calibration={"max_statistics_bytes": 300})
        assert calibration.passes == 3 + 6
        assert bounded.content_hash() == whole.content_hash()

    @pytest.mark.parametrize("score", ["paper", "official", "mag_l1", "mag_l2"])
    def test_matrices_by_the_pure_function(self, calibration, body, ids, score: str):
        plan = plan_of(calibration, score=score)
        for name in ("left", "right", "extra"):
            x = inputs_of(body, ids)[name]
            statistic = {"paper": x.norm(dim=0), "official": x.square().mean(0)}.get(score)
            weight = body.get_submodule(name).weight.detach()
            scores = column_scores(weight, None if statistic is None else statistic, score)
            assert torch.equal(plan.columns[f"{name}.weight"], select_frozen(scores, 0.5))

    @pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
    def test_forgetscale_ranks_all_matrices_together(self, calibration, fraction: float):
        fisher = plan_of(calibration, score="fisher", frozen_fraction=fraction).scores
        plan = plan_of(calibration, score="forgetscale", frozen_fraction=fraction)
        names = ["left.weight", "right.weight", "extra.weight"]
        # All three are 4 high: 16 columns, ranked by their sum of squared gradients.
        joint = torch.cat([fisher[name] for name in names])
        frozen = torch.zeros(16, dtype=torch.bool)
        frozen[select_frozen(joint, fraction)] = True
        for name, part in zip(names, frozen.split([6, 6, 4]), strict=True):
            assert torch.equal(plan.columns[name], part.nonzero().flatten()), name
        for name in ("left.bias", "norm.weight"):
            weight = calibration.structure.get_parameter(name).detach().abs()
            assert torch.equal(plan.columns[name], select_frozen(weight, fraction))

    @pytest.mark.parametrize("score", PER_MATRIX)
    @pytest.mark.parametrize(
        ("fraction", "wide", "narrow"), [(0.0, 0, 0), (0.3, 1, 1), (1.0, 6, 4)]
    )
    def test_counts(self, calibration, score: str, fraction: float, wide: int, narrow: int):
        plan = plan_of(calibration, score=score, frozen_fraction=fraction)
        counts = {name: len(index) for name, index in plan.columns.items()}
        assert counts == {
            "left.weight": wide,
            "left.bias": narrow,
            "right.weight": wide,
            "norm.weight": narrow,
            "extra.weight": narrow,
        }

    def test_vectors(self, calibration):
        every = {"left.bias", "norm.weight"}
        plan = plan_of(calibration, vectors="elementwise")
        assert every <= set(plan.columns) and not plan.whole
        plan = plan_of(calibration, vectors="train")
        assert every.isdisjoint(plan.columns) and not plan.whole
        plan = plan_of(calibration, vectors="freeze")
        assert every.isdisjoint(plan.columns) and plan.whole == every

    def test_vector_scores(self, calibration, body):
        """A vector's element is a column; a bias reads the constant 1."""
        x = input_statistics(calibration, find_targets(body), config())
        x = {name: values["norm.weight"] for name, values in x.items()}
        gain, bias = (p.detach().double().abs() for p in (body.norm.weight, body.left.bias))
        diagonal = x["l2_norm"].square()
        expected = {
            "paper": (gain * x["l2_norm"], bias),
            "official": (gain * (1 + x["mean_square"]), bias),
            "sgpt_official": (gain * (1 + x["recent_mean_square"]), bias),
            "sgpt_true": (gain**2 * (diagonal + 0.01 * diagonal.mean()), bias**2),
            "mag_l1": (gain, bias),
            "mag_l2": (gain, bias),
        }
        found = column_scores_of(
            calibration, find_targets(body), list(expected), config(score="sgpt_true")
        )
        for score, (for_gain, for_bias) in expected.items():
            assert torch.allclose(found[score]["norm.weight"], for_gain.float(), rtol=1e-6), score
            assert torch.allclose(found[score]["left.bias"], for_bias.float(), rtol=1e-6), score

    def test_shielded_rows(self, calibration):
        plan = plan_of(calibration, shield_token_ids=[7, 2, 7])
        assert {k: v.tolist() for k, v in plan.rows.items()} == {
            "embed.weight": [2, 7],
            "lm_head.weight": [2, 7],
        }
        with pytest.raises(
            ConfigError, match="shield_token_ids holds 11, but the vocabulary has 11"
        ):
            plan_of(calibration, shield_token_ids=[11])

    @pytest.mark.parametrize(
        ("min_count", "named", "expected"),
        [
            (1, [], [0, 3, 6, 10]),
            (2, [], [0, 2, 3, 6, 7, 10]),
            (1, [6, 4], [0, 3, 4, 6, 10]),
            (10, [], list(range(11))),
        ],
    )
    def test_rows_the_target_text_does_not_use(self, calibration, min_count, named, expected):
        rule = {"rule": "unused_in_target", "min_count": min_count}
        plan = plan_of(calibration, shield_rows=rule, shield_token_ids=named)
        assert {k: v.tolist() for k, v in plan.rows.items()} == {
            "embed.weight": expected,
            "lm_head.weight": expected,
        }
        assert plan.provenance["shield_rows"] == rule
        assert plan.provenance["shield_token_ids"] == named

    def test_the_target_text_is_counted_only_where_asked(self, calibration):
        calibration.target_token_counts = None
        plan = plan_of(calibration)
        assert plan.rows == {} and plan.provenance["shield_rows"] is None

    @pytest.mark.parametrize(
        ("score", "passes"),
        [("paper", 3), ("fisher", 3), ("sgpt_official", 3), ("mag_l2", 0), ("rand", 0)],
    )
    def test_source_data_are_read_only_where_needed(self, calibration, score: str, passes: int):
        plan_of(calibration, score=score)
        assert calibration.passes == passes

    def test_random_choice(self):
        first = random_frozen("a", 40, 0.5, 1)
        assert torch.equal(first, random_frozen("a", 40, 0.5, 1))
        assert not torch.equal(first, random_frozen("b", 40, 0.5, 1))
        assert not torch.equal(first, random_frozen("a", 40, 0.5, 2))
        assert first.tolist() == sorted(set(first.tolist())) and len(first) == 20

    def test_random_choice_is_uniform(self):
        counts = torch.zeros(10)
        for seed in range(400):
            counts[random_frozen("w", 10, 0.5, seed)] += 1
        # 400 draws of one half: 5 standard deviations are 50.
        assert (counts - 200).abs().max() < 50

    def test_weight_norms(self, calibration, body):
        for power in (1, 2):
            found = weight_norms(calibration, find_targets(body), power)
            expected = body.left.weight.detach().double().norm(p=power, dim=0)
            assert torch.allclose(found["left.weight"], expected, rtol=1e-12)
            assert torch.allclose(found["left.bias"], body.left.bias.detach().double().abs())
