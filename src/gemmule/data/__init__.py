"""Raw text to token shards to batches; torch is known to `gemmule.data.batches` alone."""

from gemmule.data.corpus import Corpus, check_corpus
from gemmule.data.prepare import Dataset, open_dataset, prepare_dataset
from gemmule.data.report import CorpusReport
from gemmule.data.settings import DataSettings

__all__ = ["Corpus", "CorpusReport", "DataSettings", "Dataset", "check_corpus", "open_dataset", "prepare_dataset"]
