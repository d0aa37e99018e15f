// All loops of the library but Adam's, compiled once per instruction set; see isa.h. The order is that of use.

#include "vectors.inl"
#include "lookup.inl"
#include "sparse.inl"
#include "topk.inl"
#include "tower.inl"
#include "transform.inl"
#include "trellis.inl"
#include "beam.inl"
