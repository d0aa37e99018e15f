# Written by `python -m pocketrec.testing.stubs`: the plug-ins of this folder, for editors and type checkers.

from pocketrec.sources.adjacency import Adjacency as Adjacency
from pocketrec.sources.avazu import Avazu as Avazu
from pocketrec.sources.criteo import Criteo as Criteo
from pocketrec.sources.interactions import Interactions as Interactions
from pocketrec.sources.kdd12 import Kdd12 as Kdd12
from pocketrec.sources.libfm import Libfm as Libfm
from pocketrec.sources.synthetic import Synthetic as Synthetic
from pocketrec.sources.table import Table as Table
