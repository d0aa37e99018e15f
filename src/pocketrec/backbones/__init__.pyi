# Written by `python -m pocketrec.testing.stubs`: the plug-ins of this folder, for editors and type checkers.

from pocketrec.backbones.dcn_mix import DCNMix as DCNMix
from pocketrec.backbones.dcnv2 import DCNv2 as DCNv2
from pocketrec.backbones.deepfm import DeepFM as DeepFM
from pocketrec.backbones.fm import FM as FM
from pocketrec.backbones.gmf import GMF as GMF
from pocketrec.backbones.lightgcn import LightGCN as LightGCN
from pocketrec.backbones.mf import MF as MF
from pocketrec.backbones.mlp import MLP as MLP
from pocketrec.backbones.neumf import NeuMF as NeuMF
from pocketrec.backbones.pair_mlp import PairMLP as PairMLP
