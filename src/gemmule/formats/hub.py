"""Models of the Hugging Face Hub, fetched once into its library's cache."""

import errno
from collections.abc import Callable
from pathlib import Path

from gemmule.errors import MissingExtra, ModelError, OutputError

# What `load_folder` reads; repositories hold other formats of the same weights too.
FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


def fetch(repo_id: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of a model `owner/name`, downloaded where it is not there yet, with progress on stderr.

    A download that was cut goes on where it stopped. ModelError says what to do where the licence must be accepted
    first, where there is no such model, and where the Hub cannot be reached.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", f"fetching {repo_id}") from None
    say(f"fetching {repo_id} from the Hugging Face Hub; what is there already is kept")
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=FILES))
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repo_id}"
        advice = f"open {page}, accept it, then run  hf auth login  here and try again"
        raise ModelError(f"{repo_id}: its licence must be accepted first: {advice}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        advice = "check the name; for a private model run  hf auth login  first"
        raise ModelError(
            f"{repo_id}: no such folder here, and no such model on the Hugging Face Hub; {advice}"
        ) from None
    except Exception as error:  # requests, httpx, Xet: each transport has a family of its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OutputError(f"{repo_id}: no space left on the device; free some and try again") from error
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        advice = "no such folder here, and it cannot be fetched from the Hugging Face Hub"
        raise ModelError(f"{repo_id}: {advice} ({reason}); try again, what has arrived is kept") from error
