// Registers of floats, and what is loaded into them and stored; compiled once per instruction set.

constexpr int LANES = POCKETREC_LANES;
typedef float Floats __attribute__((vector_size(4 * POCKETREC_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * POCKETREC_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * POCKETREC_LANES)));

template <class T>
inline T load(const void *from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline Floats load_floats(const float *from) { return load<Floats>(from); }

inline Floats load_floats(const uint16_t *from) {
#if POCKETREC_LANES == 16
  const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#elif POCKETREC_LANES == 8
  const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
  const Words wide = __builtin_convertvector(load<Halves>(from), Words) << 16;
#endif
  return load<Floats>(&wide);
}

inline float load_float(const float *from) { return *from; }

inline float load_float(const uint16_t *from) {
  const uint32_t wide = static_cast<uint32_t>(*from) << 16;
  return load<float>(&wide);
}

inline void store_float(float *to, float value) { *to = value; }

// Nearest bfloat16, ties to even; NaN stays NaN.
inline void store_float(uint16_t *to, float value) {
  const uint32_t bits = load<uint32_t>(&value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *to = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store_floats(float *to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

inline void store_floats(uint16_t *to, Floats values) {
#if POCKETREC_LANES == 16
  const Words bits = load<Words>(&values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words narrow = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
  const __m256i halves = _mm512_cvtepi32_epi16(load<__m512i>(&narrow));
  std::memcpy(to, &halves, sizeof(halves));
#else
  for (int lane = 0; lane < LANES; ++lane) store_float(to + lane, values[lane]);
#endif
}
