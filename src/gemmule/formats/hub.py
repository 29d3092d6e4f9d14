"""Download models from the Hugging Face Hub into its cache."""

import errno
import logging
from pathlib import Path

from gemmule.errors import MissingExtra, ModelError, OutputError

log = logging.getLogger(__name__)

# Files that `load_folder` reads; repositories may also hold the weights in other formats.
FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",  # names the license
    "LICENSE*",
    "NOTICE*",
]


def fetch(repo_id: str) -> Path:
    """Download a model `owner/name` unless it is cached, with progress on stderr; returns its folder.

    An interrupted download resumes. ModelError for a gated model, an unknown model, and an unreachable Hub.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", f"downloading {repo_id}") from None
    log.info(f"downloading {repo_id} from the Hugging Face Hub (cached files are reused)")
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=FILES))
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repo_id}"
        advice = f"open {page}, accept it, then run  hf auth login  here and try again"
        raise ModelError(f"{repo_id}: its license must be accepted first: {advice}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        advice = "check the name; for a private model run  hf auth login  first"
        raise ModelError(f"{repo_id}: no such folder, and no such model on the Hugging Face Hub; {advice}") from None
    except Exception as error:  # requests, httpx, Xet: each transport has its own exceptions
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OutputError(f"{repo_id}: no space left on the device; free some and try again") from error
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        advice = "no such folder, and it cannot be downloaded from the Hugging Face Hub"
        raise ModelError(f"{repo_id}: {advice} ({reason}); try again, the download resumes") from error
