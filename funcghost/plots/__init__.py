"""Figures of values, and the report of a store: one HTML file with everything in it.

Each function takes the folder of a store, or arrays, and gives a matplotlib figure (`.savefig("it.png")`):

    over_steps, by_group, distribution    values of a record or an array
    account                               what the steps of a run did to the validation loss
    gram, cosine, spectrum                how the gradients of a batch lie to one another
    lds_against_cost                      attribution methods
    contact_sheet, text_cards             the samples of the largest or the smallest values
    report                                a page of a store, with more figures if wanted

May import: all wings up to `integrations`; needs the extra `plots` (matplotlib, pyarrow). Read `reading.py` first.
"""

from funcghost.plots import needs
from funcghost.plots.cards import contact_sheet, text_cards
from funcghost.plots.drawings import account, by_group, distribution, over_steps
from funcghost.plots.maps import cosine, gram, lds_against_cost, spectrum
from funcghost.plots.report import Reported, report

__all__ = [
    "Reported",
    "account",
    "by_group",
    "contact_sheet",
    "cosine",
    "distribution",
    "gram",
    "lds_against_cost",
    "needs",
    "over_steps",
    "report",
    "spectrum",
    "text_cards",
]
