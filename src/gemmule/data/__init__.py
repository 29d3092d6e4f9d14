"""Datasets: raw text to token shards to batches; only `gemmule.data.batches` imports torch.

Exported here is what training opens; `gemmule.data.prepare` makes it.
"""

from gemmule.data.corpus import Corpus, check_corpus
from gemmule.data.dataset import Dataset, open_dataset, prepared_folder
from gemmule.data.report import CorpusReport
from gemmule.data.settings import DataSettings

__all__ = ["Corpus", "CorpusReport", "DataSettings", "Dataset", "check_corpus", "open_dataset", "prepared_folder"]
