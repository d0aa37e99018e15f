// What crosses the border of the library: structures, functions, and digests of both. Plain C.
//
// A caller describes its tables by the structures below. It may have been written against another version of this file,
// so `pocketrec_abi` tells a digest of each structure and function as this library has them, for the caller to compare
// with its own. Structures are lists of fields, so that what is digested is what is compiled.

#ifndef POCKETREC_ABI_H
#define POCKETREC_ABI_H

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(_WIN32)
#define POCKETREC_EXPORT extern "C" __declspec(dllexport)
#else
#define POCKETREC_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace pocketrec {

enum Status : int { OK = 0, BAD_INDEX = 1, NO_MEMORY = 2 };

enum Number : int { FP32 = 0, FP16 = 1, INT8 = 2, BF16 = 3 };

// One block of entries; a null pointer is an array that the layout leaves out.
#define POCKETREC_BLOCK(FIELD)                                                                     \
  FIELD(int64_t, start) FIELD(int64_t, stop) FIELD(int64_t, present) FIELD(int64_t, values_count)  \
  FIELD(int32_t, left) FIELD(int32_t, width)                                                       \
  FIELD(int32_t, number)            /* of the values: a Number */                                  \
  FIELD(int32_t, shift)             /* an offset every 2 ** shift present rows */                  \
  FIELD(const uint8_t *, presence)                                                                 \
  FIELD(const uint8_t *, rank)      /* uint32, perhaps unaligned in the file */                    \
  FIELD(const uint8_t *, masks)     /* without offsets: for each row its uint32 offset and mask */ \
  FIELD(const uint8_t *, offsets)   /* uint32 */                                                   \
  FIELD(const uint8_t *, values)                                                                   \
  FIELD(const uint8_t *, scale)     /* float (fields, width) */

// What is asked of a table; the library itself fills it in.
#define POCKETREC_ASKED(FIELD)                                                                          \
  FIELD(const int64_t *, rows)      /* (count), column after column of one sample, then the next one */ \
  FIELD(const int32_t *, fields)    /* (columns) */                                                     \
  FIELD(int64_t, count) FIELD(int64_t, columns)                                                         \
  FIELD(float *, out)               /* (count, width) */

// A table of blocks of entries.
#define POCKETREC_LOOKUP(FIELD)                                                        \
  FIELD(const Block *, blocks) FIELD(int64_t, block_count)                             \
  FIELD(const float *, fill) FIELD(const float *, absent)   /* (field_count, width) */ \
  FIELD(int64_t, field_count) FIELD(int64_t, width) POCKETREC_ASKED(FIELD)

// The rows of one field in a table of layout `transform`; its small tables are padded to an even number of directions.
#define POCKETREC_PART(FIELD)                                                                      \
  FIELD(int64_t, first) FIELD(int64_t, rows)          /* file rows */                              \
  FIELD(int64_t, code_start) FIELD(int64_t, code_bytes) /* first bit of its codes, bytes of all */ \
  FIELD(int64_t, stride)            /* entries of a direction of the basis: a multiple of 16 */    \
  FIELD(int64_t, directions)        /* one past the last one with a code */                        \
  FIELD(int32_t, planes) FIELD(int32_t, classes)                                                   \
  FIELD(const uint8_t *, class_planes)                                                             \
  FIELD(const uint8_t *, offsets)   /* uint32 */                                                   \
  FIELD(const uint8_t *, codes)                                                                    \
  FIELD(const int32_t *, weights)   /* (8): of sets of planes */                                   \
  FIELD(const int32_t *, record)    /* (8): bits of a row */                                       \
  FIELD(const int32_t *, widest)    /* (padded): bits of a direction's longest code */             \
  FIELD(const uint32_t *, bits)     /* (padded, 8): of a code, by direction and class */           \
  FIELD(const uint32_t *, mask)     /* (padded, 8) */                                              \
  FIELD(const uint32_t *, scale)    /* (padded, 8): a float */                                     \
  FIELD(const float *, basis)       /* (padded, stride) */                                         \
  FIELD(const float *, last)        /* (padded): its last column */

// A table of layout `transform`.
#define POCKETREC_TRANSFORM(FIELD)                                                     \
  FIELD(const Part *, parts)        /* by rising rows */                               \
  FIELD(int64_t, part_count) FIELD(const float *, levels)                              \
  FIELD(const float *, fill) FIELD(const float *, absent)   /* (field_count, width) */ \
  FIELD(int64_t, field_count) FIELD(int64_t, width) POCKETREC_ASKED(FIELD)

// One trellis code, its windows step by step; `padded` entries each.
#define POCKETREC_TRELLIS_CODE(FIELD)                                                               \
  FIELD(const float *, table)       /* (2 ** memory, 1, 2 or 4), the first `span` of which count */ \
  FIELD(const int32_t *, first)     /* (padded): first bit of the window */                         \
  FIELD(const int32_t *, mask)      /* (padded) */                                                  \
  FIELD(const int32_t *, shift)     /* (padded): window -> row of the table */                      \
  FIELD(int64_t, steps) FIELD(int64_t, span)          /* no steps: nothing is coded */

// A table of layout `trellis`.
#define POCKETREC_TRELLIS(FIELD)                                                                         \
  FIELD(int64_t, first) FIELD(int64_t, users) FIELD(int64_t, items)   /* file rows from `first` on */    \
  FIELD(int64_t, user_start) FIELD(int64_t, user_bits)    /* first bit of users' records, bits of one */ \
  FIELD(int64_t, code_bytes) FIELD(int64_t, candidate_count) FIELD(int64_t, centroid_bytes)              \
  FIELD(int64_t, shapes) FIELD(int64_t, places) FIELD(int64_t, atoms)                                    \
  FIELD(const Part *, index)        /* planes, offsets and record sizes of items */                      \
  FIELD(const TrellisCode *, codes) /* (9): of each class, and of users */                               \
  FIELD(const uint8_t *, stream) FIELD(const uint8_t *, centroids)                                       \
  FIELD(const uint32_t *, candidates) /* (candidate_count) */                                            \
  FIELD(const float *, levels)      /* (16): values of a centroid's numbers */                           \
  FIELD(const float *, gains) FIELD(const float *, item_scales) FIELD(const float *, user_scales)        \
  FIELD(const float *, coefficients)                                                                     \
  FIELD(const float *, fill) FIELD(const float *, absent)   /* (field_count, width) */                   \
  FIELD(int64_t, field_count) FIELD(int64_t, width)

// A table in training: weights and moments (rows, width), and the step that each row is up to date with.
#define POCKETREC_ROWS(FIELD) \
  FIELD(float *, weight) FIELD(float *, first) FIELD(float *, second) FIELD(int32_t *, updated) FIELD(int64_t, width)

// Settings of Adam, and of one step.
#define POCKETREC_RULE(FIELD)                                                                                      \
  FIELD(float, learning_rate) FIELD(float, weight_decay) FIELD(float, eps) FIELD(float, beta1) FIELD(float, beta2) \
  FIELD(float, rate)                /* c(step) */                                                                  \
  FIELD(float, unbias)              /* sqrt(1 - beta2^step) */

// The momentum tail T by step, and functions of a number of steps.
#define POCKETREC_CURVES(FIELD)                                                        \
  FIELD(const float *, tail) FIELD(const float *, decay1) FIELD(const float *, decay2) \
  FIELD(const float *, ratio) FIELD(const float *, ramp)

#define POCKETREC_STRUCTURES(EACH)                                                       \
  EACH(Block, POCKETREC_BLOCK) EACH(Lookup, POCKETREC_LOOKUP) EACH(Part, POCKETREC_PART) \
  EACH(Transform, POCKETREC_TRANSFORM) EACH(TrellisCode, POCKETREC_TRELLIS_CODE)         \
  EACH(Trellis, POCKETREC_TRELLIS) EACH(Rows, POCKETREC_ROWS) EACH(Rule, POCKETREC_RULE) \
  EACH(Curves, POCKETREC_CURVES)

#define POCKETREC_MEMBER(type, name) type name;
#define POCKETREC_DEFINE(Name, FIELDS) struct Name { FIELDS(POCKETREC_MEMBER) };
POCKETREC_STRUCTURES(POCKETREC_DEFINE)
#undef POCKETREC_DEFINE
#undef POCKETREC_MEMBER

}  // namespace pocketrec

// Instruction set in use: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with VNNI.
POCKETREC_EXPORT int pocketrec_level();

// Use no instruction set above `most`.
POCKETREC_EXPORT void pocketrec_limit(int most);

// Digest of a structure or a function of this file by its name, 0 where there is none.
POCKETREC_EXPORT uint64_t pocketrec_abi(const char *name);

// out[i] = add[i] + left[r] * sum over neighbours j of r of right[j] * x[j], with r = subset[i] (or i).
POCKETREC_EXPORT int pocketrec_spmm(const int64_t *indptr, const int32_t *indices, int64_t rows, int64_t columns,
                                    int64_t entries, const void *x, int x_number, void *out, int out_number,
                                    const float *left, const float *right, const int64_t *subset, const void *add,
                                    int64_t count, int64_t width, int threads);

// Look-ups write out (count, width); rows out of range are absent, a field out of range is an error. The members of a
// table that say what is asked for are not read.
POCKETREC_EXPORT int pocketrec_lookup(const pocketrec::Lookup *table, const int64_t *rows, const int32_t *fields,
                                      int64_t count, int64_t columns, float *out, int threads);
POCKETREC_EXPORT int pocketrec_transform(const pocketrec::Transform *table, const int64_t *rows, const int32_t *fields,
                                         int64_t count, int64_t columns, float *out, int threads);
POCKETREC_EXPORT int pocketrec_trellis(const pocketrec::Trellis *table, const int64_t *rows, const int32_t *fields,
                                       int64_t count, int64_t columns, float *out, int threads);

// Codes (count, steps) of rows under quadratic losses, by beam search.
POCKETREC_EXPORT int pocketrec_beam(const float *table, int64_t bits, int64_t span, int64_t memory, const float *rows,
                                    const float *scales, const float *upper, const float *weights, int64_t count,
                                    int64_t width, int64_t beams, uint8_t *codes);

// The k best items per user by inner product, without the seen ones; ties go to the smaller id; -1 where none is left.
POCKETREC_EXPORT int pocketrec_topk(const float *users, int64_t user_count, const float *items, int64_t item_count,
                                    int64_t width, const int64_t *seen_indptr, const int32_t *seen_indices,
                                    int64_t seen_entries, int64_t k, int32_t *ids, float *scores, int threads);

// Perceptron scores (user_count, item_count) of all pairs, from the two parts of the first layer.
POCKETREC_EXPORT int pocketrec_tower(const float *users, const float *items, const float *user_counts,
                                     const float *item_counts, const float *bias, int64_t user_count,
                                     int64_t item_count, int64_t width, const float *weights, const int64_t *widths,
                                     int64_t layers, float *out, int threads);

// Distinct ids in order of first appearance -> rows (at most `count`), and the place of each id in it. `mark (limit)`
// is all -1 before and after. Returns the number of rows, or -1 where an id is out of range.
POCKETREC_EXPORT int64_t pocketrec_adam_distinct(const int64_t *ids, int64_t count, int32_t *mark, int64_t limit,
                                                 int64_t *rows, int32_t *place);

// Brings `rows` from the step they were last updated at to `step`. Rows must lie inside the table.
POCKETREC_EXPORT void pocketrec_adam_catch_up(const pocketrec::Rows *table, const pocketrec::Rule *rule,
                                              const pocketrec::Curves *curves, const int64_t *rows, int64_t count,
                                              int64_t step);

// One step on `rows`: their gradient is the sum of `gradients (places, width)` over the places that name them.
POCKETREC_EXPORT void pocketrec_adam_update(const pocketrec::Rows *table, const pocketrec::Rule *rule,
                                            const int64_t *rows, int64_t count, const int32_t *place, int64_t places,
                                            const float *gradients, float *sums, int64_t step);

#define POCKETREC_FUNCTIONS(EACH)                                                               \
  EACH(pocketrec_level) EACH(pocketrec_limit) EACH(pocketrec_abi) EACH(pocketrec_spmm)          \
  EACH(pocketrec_lookup) EACH(pocketrec_transform) EACH(pocketrec_trellis) EACH(pocketrec_beam) \
  EACH(pocketrec_topk) EACH(pocketrec_tower) EACH(pocketrec_adam_distinct)                      \
  EACH(pocketrec_adam_catch_up) EACH(pocketrec_adam_update)

#endif  // POCKETREC_ABI_H
