"""Raw text to token shards to batches; torch is known to `gemmule.data.batches` alone.

What training needs is here; `gemmule.data.prepare` makes what it opens.
"""

from gemmule.data.corpus import Corpus, check_corpus
from gemmule.data.dataset import Dataset, open_dataset, prepared_folder
from gemmule.data.report import CorpusReport
from gemmule.data.settings import DataSettings

__all__ = ["Corpus", "CorpusReport", "DataSettings", "Dataset", "check_corpus", "open_dataset", "prepared_folder"]
