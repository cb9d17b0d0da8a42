"""A published export: which files belong to it, whether they are whole, and their upload through huggingface_hub.

Does not know how the files are made (``free_dist.evaluation.release``), and stores no credentials: huggingface_hub has its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError
from yaml import YAMLError

from free_dist.config import MissingFileError, UserError
from free_dist.exits import check_files
from free_dist.exits.export import WEIGHTS, read_weights
from free_dist.exits.manifest import MANIFEST, ExportError, read_exits_manifest

CARD = "README.md"


def check_release(directory: str | Path) -> list[Path]:
    """The files of an export that is ready to be published, whole and belonging together, in a fixed order.

    Raises MissingFileError, ExportError or UserError naming the file that is missing, damaged or of another export.
    """
    directory = Path(directory)
    manifest = read_exits_manifest(directory)
    read_weights(directory, manifest)
    files = [directory / name for name in (CARD, MANIFEST, WEIGHTS)]
    if (directory / check_files.MANIFEST).is_file():
        checks = check_files.read_checks_manifest(directory)
        weights = directory / check_files.WEIGHTS
        if checks.exits_sha256 != manifest.weights_sha256:
            raise ExportError(f"{directory / check_files.MANIFEST} was fitted to other exits: fit the checks again")
        if not weights.is_file():
            raise MissingFileError(
                f"{weights} does not exist although {check_files.MANIFEST} does: fit the checks again"
            )
        if hashlib.sha256(weights.read_bytes()).hexdigest() != checks.weights_sha256:
            raise ExportError(f"{weights} does not match the checksum in {check_files.MANIFEST}: fit the checks again")
        files += [directory / check_files.MANIFEST, weights]
    for task in manifest.calibrated:
        files.append(directory / f"calibration-{task}.json")
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise MissingFileError(f"{missing[0]} does not exist: make the directory with launch/export.py")
    try:
        library = ModelCard.load(directory / CARD).data.library_name
    except (ValueError, YAMLError, AttributeError) as error:
        raise UserError(f"{directory / CARD} has no front matter that can be read ({error})") from error
    if library != "free_dist":
        raise UserError(f"{directory / CARD}: library_name is {library!r}, want 'free_dist'")
    return files


def push_to_hub(directory: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload the files of :func:`check_release` in one commit, into a repository that is made if need be -> its address.

    Raises what :func:`check_release` raises, and UserError where the hub cannot be reached or refuses.
    """
    files = check_release(directory)
    api = HfApi()
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=directory,
            allow_patterns=[path.name for path in files],
            commit_message="Early exits",
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"--push {repo_id}: {str(error).splitlines()[0]}; the files in {directory} are complete"
        ) from error
    return str(repository)
