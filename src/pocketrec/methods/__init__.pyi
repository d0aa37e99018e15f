# Written by `python -m pocketrec.testing.stubs`: the plug-ins of this folder, for editors and type checkers.

from pocketrec.methods.cerp import CERP as CERP
from pocketrec.methods.dhe import DHE as DHE
from pocketrec.methods.frequency_distance import FrequencyDistance as FrequencyDistance
from pocketrec.methods.mag_prune import MagPrune as MagPrune
from pocketrec.methods.opt_embed import OptEmbed as OptEmbed
from pocketrec.methods.opt_embed_d import OptEmbedD as OptEmbedD
from pocketrec.methods.pep import PEP as PEP
from pocketrec.methods.ptq import PTQ as PTQ
from pocketrec.methods.qr import QR as QR
from pocketrec.methods.random import Random as Random
from pocketrec.methods.rate_distortion import RateDistortion as RateDistortion
from pocketrec.methods.shaver import Shaver as Shaver
from pocketrec.methods.tt_rec import TTRec as TTRec
