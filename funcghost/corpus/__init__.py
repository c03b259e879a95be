"""Every sample of a data set scored in one pass, kept on the disk, and asked: the best, the nearest, exact scores anew.

May import: all wings up to `attribution`; needs the extra `store`. Read `score.py` first: data are cut into parts, and
a part is a function of its samples and the settings alone, so that ranks and restarts change nothing.
"""

from funcghost.corpus import needs
from funcghost.corpus.approximating import Index, approximate
from funcghost.corpus.asking import Corpus, Hits, open
from funcghost.corpus.keeping import keep, kept
from funcghost.corpus.merging import merge
from funcghost.corpus.rescoring import rescore
from funcghost.corpus.score import Scored, score
from funcghost.corpus.verifying import verify

__all__ = [
    "Corpus",
    "Hits",
    "Index",
    "Scored",
    "approximate",
    "keep",
    "kept",
    "merge",
    "needs",
    "open",
    "rescore",
    "score",
    "verify",
]
