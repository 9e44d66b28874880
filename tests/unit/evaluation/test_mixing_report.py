"""Mixtures and style in the report: shares measured, families of methods, plots that are drawn."""

import json

import pytest
import yaml

from forgetscale.errors import DataError
from forgetscale.evaluation.report import build_report
from forgetscale.evaluation.report.mixing import mixing_plot
from forgetscale.evaluation.report.text_style import style_plot

PERPLEXITY = [300.0, 40.0, 12.0, 6.0, 4.0]
KEPT = {
    "sft": 0.2,
    "freeze_layers": 0.3,
    "selfdialogue/hard@0.25": 0.5,
    "selfdialogue/hard@0.5": 0.7,
    "external@0.5": 0.4,
}


def make_mixture(path, share):
    """Give a run the recipe and metrics of a mixture with this share of self-written targets."""
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    sets = [{"name": "task", "path": "/a/task"}, {"path": "/a/self"}]
    recipe["data"] = {"kind": "mixture", "sets": sets}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (path / "metrics.jsonl").open("a") as file:
        row = {"step": 999, "data/target_share/task": 1 - share, "data/target_share/self": share}
        file.write(json.dumps(row | {"data/token_share/task": 0.9}) + "\n")


@pytest.fixture
def folders(make_run):
    found = []
    for method, end in KEPT.items():
        for seed in range(3):
            recalls = [1 - (1 - end) * share for share in (0, 0.5, 0.8, 0.95, 1)]
            path = make_run(method, seed, [r - 0.01 * seed for r in recalls], PERPLEXITY)
            recipe = yaml.safe_load((path / "recipe.yaml").read_text())
            recipe["run"]["label"] = method
            (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            if "@" in method:
                make_mixture(path, float(method.partition("@")[2]) + 0.01 * (seed - 1))
            found.append(path)
    return found


def write_style(path, seed, moved):
    style = {
        "nll": {"task": 5.0 + seed, "self": 0.5},
        "cosine": {"task|self": {"1": 0.1, "0": 0.2, "all": -0.1 * seed}},
        "drift": {"all": moved, "model.norm.weight": 0.0},
    }
    (path / "results" / "style.json").write_text(json.dumps(style))


def read(path):
    return json.loads((path.parent / "report.json").read_text())


def test_families_by_their_measured_share(folders, tmp_path):
    path = build_report(folders, tmp_path / "report")
    data = read(path)
    mixing = data["mixing"]
    assert list(mixing["families"]) == ["selfdialogue/hard", "external"]
    points = mixing["families"]["selfdialogue/hard"]
    assert [point["share"] for point in points] == pytest.approx([0.25, 0.5])
    assert {entry["method"] for entry in mixing["beside"]} == {"sft", "freeze_layers"}
    deep = [point["kept"][-1] for point in points]
    assert [round(value["mean"], 3) for value in deep] == [0.49, 0.69]
    assert deep[0]["seeds"] == pytest.approx({"0": 0.5, "1": 0.49, "2": 0.48})
    assert data["claim"]["status"] == "held"
    svg = mixing_plot(data)
    assert svg is not None and svg in path.read_text()
    for words in ("selfdialogue/hard", "external", "freeze_layers", "sft (share 0)"):
        assert words in svg


def test_no_plot_without_two_shares_of_a_family(folders, tmp_path):
    kept = [path for path in folders if "0.25" not in path.name]
    data = read(build_report(kept, tmp_path / "report"))
    assert data["mixing"] == {} and mixing_plot(data) is None


def test_style_counts_each_world_once(folders, tmp_path):
    for path in folders[:6]:
        seed = int(path.name[-1])
        write_style(path, seed, 0.1 if path.name.startswith("sft") else 0.2)
    data = read(path := build_report(folders, tmp_path / "report"))
    style = data["style"]
    assert style["nll"]["task"]["mean"] == pytest.approx(6.0)
    assert style["nll"]["task"]["num_seeds"] == 3
    assert list(style["cosine"]["task|self"]) == ["0", "1", "all"]
    assert style["drift"]["freeze_layers"]["mean"] == pytest.approx(0.2)
    svg = style_plot(data)
    assert svg is not None and svg in path.read_text()


def test_without_style_there_is_no_plot_and_damage_is_named(folders, tmp_path):
    data = read(build_report(folders, tmp_path / "report"))
    assert data["style"] == {} and style_plot(data) is None
    (folders[0] / "results" / "style.json").write_text("{")
    with pytest.raises(DataError, match=r"style.json is not valid JSON"):
        build_report(folders, tmp_path / "report")
    (folders[0] / "results" / "style.json").write_text("[1]")
    with pytest.raises(DataError, match=r"is not what forgetscale generate --style writes"):
        build_report(folders, tmp_path / "report")
