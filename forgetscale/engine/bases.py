"""The Fisher basis of a run: measured from the source model, given by path, or kept from before."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetscale.artifact import (
    fsync_path,
    hash_file,
    publish,
    read_manifest,
    verify_artifact,
    wait_until_visible,
)
from forgetscale.config import Recipe, recipe_dict
from forgetscale.errors import ConfigError, DataError
from forgetscale.projections.basis import (
    BASIS_KIND,
    CONVENTION,
    FisherBasis,
    MeasuredBasis,
    save_share,
)
from forgetscale.zero3 import World

BASIS_FOLDER = "fisher"
REFRESHED_FOLDER = "fisher-refreshed"


def write_basis(
    directory: Path, measured: MeasuredBasis, recipe: Recipe, world: World
) -> FisherBasis:
    """Publish a basis that every rank holds a share of; return it as it is on disk.

    Args:
        directory: Folder, new or empty.
        measured: This rank's share.
        recipe: Resolved recipe, recorded.
        world: This process among all.

    Raises:
        DataError: The folder exists already.

    Collective: every rank must call it.
    """

    def begin() -> str:
        if directory.exists() and any(directory.iterdir()):
            raise DataError(f"{directory} exists already; name another folder or remove it.")
        temporary = directory.with_name(f".{directory.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir(parents=True)
        return str(temporary)

    temporary = Path(world.on_main(begin))
    path = save_share(temporary, measured, world.rank, world.size)
    fsync_path(path)
    parts = world.gather_objects({path.name: hash_file(path)})
    known = {name: digest for part in parts for name, digest in part.items()}

    def commit() -> str:
        if directory.exists():
            shutil.rmtree(directory)
        manifest = publish(
            temporary,
            directory,
            kind=BASIS_KIND,
            payload=measured.payload,
            inputs={"model": str(measured.payload["model_hash"])},
            recipe=recipe_dict(recipe),
            known_hashes=known,
        )
        return str(manifest["self_hash"])

    wait_until_visible(directory, world.on_main(commit))
    return FisherBasis(directory, verify=False)


def open_basis(directory: Path, world: World) -> FisherBasis:
    """Verify a finished basis, ranks sharing the files, and open it.

    Args:
        directory: The artefact.
        world: This process among all.

    Raises:
        DataError: There is none, or a file was damaged.

    Collective: every rank must call it.
    """
    error: DataError | None = None
    try:
        files = sorted(read_manifest(directory, BASIS_KIND)["files"])
        mine = None if world.size == 1 else files[world.rank :: world.size]
        verify_artifact(directory, BASIS_KIND, only=mine)
    except DataError as found:
        error = found
    world.agree(error)
    return FisherBasis(directory, verify=False)


def check_basis(basis: FisherBasis, model_hash: str, settings: Mapping[str, Any]) -> None:
    """Check that a finished basis is what a recipe asks for.

    Args:
        basis: The basis.
        model_hash: Content hash of the source model.
        settings: What the recipe asks for, by name.

    Raises:
        ConfigError: It is of another model or convention, or was made with other settings.
    """
    found = basis.payload
    where = f"Fisher basis {basis.directory}"
    again = "make it again with forgetscale calibrate --kind fisher."
    if found.get("model_hash") != model_hash:
        raise ConfigError(
            f"{where} was measured on another model (hash {str(found.get('model_hash'))[:12]}, this"
            f" one has {model_hash[:12]}); {again}"
        )
    expected = settings.get("convention", CONVENTION)
    if found.get("convention") != expected:
        raise ConfigError(
            f"{where} has the convention {found.get('convention')!r}, expected {expected!r};"
            f" {again}"
        )
    made = found.get("settings", {})
    missing = sorted(set(settings["structures"]) - set(made.get("structures", ())))
    if missing:
        raise ConfigError(
            f"{where} holds {', '.join(made.get('structures', ())) or 'nothing'}, but the method"
            f" needs {missing[0]}; {again}"
        )
    for name, wanted in settings.items():
        if name != "structures" and made.get(name) != wanted:
            raise ConfigError(
                f"{where} was made with {name} {made.get(name)!r}, the recipe says {wanted!r};"
                f" change the recipe or {again}"
            )


def settle_basis(
    recipe: Recipe,
    world: World,
    model_hash: str,
    given: Path | None,
    settings: Mapping[str, Any],
    measure: Callable[[], MeasuredBasis],
) -> FisherBasis:
    """Return the run's basis; see ``Calibration.settle_basis``. Collective.

    Args:
        recipe: Resolved recipe.
        world: This process among all.
        model_hash: Content hash of the source model.
        given: Folder of a finished basis, or None.
        settings: What the recipe asks for.
        measure: Measures it.
    """
    kept = recipe.run.output_dir / BASIS_FOLDER
    found = world.broadcast(kept.is_dir())
    if not found and given is None:
        return write_basis(kept, measure(), recipe, world)
    # The run's own comes first: a resume must not go on with another one.
    basis = open_basis(kept if found or given is None else given, world)
    check_basis(basis, model_hash, settings)
    return basis


def refreshed_folder(recipe: Recipe, step: int) -> Path:
    """Return where a basis goes that was measured again after some steps."""
    return recipe.run.output_dir / REFRESHED_FOLDER / f"step-{step:08d}"


def open_refreshed(recipe: Recipe, world: World, step: int, self_hash: str) -> FisherBasis:
    """Open the basis that was refreshed at a step; see ``Calibration.open_refreshed``.

    Args:
        recipe: Resolved recipe.
        world: This process among all.
        step: Step of the refresh.
        self_hash: What the checkpoint names.

    Raises:
        DataError: It is gone, damaged, or another one.

    Collective: every rank must call it.
    """
    directory = refreshed_folder(recipe, step)
    basis = open_basis(directory, world)
    if basis.self_hash != self_hash:
        raise DataError(
            f"{directory} is not the Fisher basis the checkpoint goes by (hash"
            f" {basis.self_hash[:12]}, expected {self_hash[:12]}); put the old one back, or remove"
            " the checkpoint to go on from the one before."
        )
    return basis


def keep_refreshed(
    recipe: Recipe,
    world: World,
    step: int,
    given: Path | None,
    settings: Mapping[str, Any],
    measure: Callable[[], MeasuredBasis],
) -> FisherBasis:
    """Measure a basis again and keep it under its step.

    One that lies there already is from a start that was cut short after it: no checkpoint goes by
    it, for every one that does has more steps.

    Args:
        recipe: Resolved recipe.
        world: This process among all.
        step: Optimizer steps done.
        given: None: a refreshed basis is always measured.
        settings: What the recipe asks for.
        measure: Measures it.

    Collective: every rank must call it.
    """
    assert given is None
    directory = refreshed_folder(recipe, step)
    measured = measure()

    def clear() -> None:
        if directory.exists():
            shutil.rmtree(directory)

    world.on_main(clear)
    return write_basis(directory, measured, recipe, world)


def drop_refreshed(recipe: Recipe, checkpoints: Sequence[int], every: int, step: int) -> None:
    """Remove refreshed bases that no checkpoint goes by. Call on one process only.

    Args:
        recipe: Resolved recipe.
        checkpoints: Steps of the checkpoints that are kept.
        every: Steps between two estimates.
        step: Step of the newest estimate, which stays.
    """
    # A checkpoint at a refresh is saved before it.
    needed = min([step, *((number - 1) // every * every for number in checkpoints)])
    for path in refreshed_folder(recipe, step).parent.glob("step-*"):
        if int(path.name.removeprefix("step-")) < needed:
            shutil.rmtree(path)
