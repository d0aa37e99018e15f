// Lazy row Adam: the closed forms of pocketrec's row_adam.py, fused over the rows of a batch; compiled once per
// instruction set.

// e^x for x <= 0, to about 2 ulp.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float whole = shifted - 12582912.0f;
  const float f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// Natural logarithm of a normal positive number, to about 2 ulp.
inline float logarithm(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t offset = bits - 0x3f3504f3;
  const int32_t exponent = offset >> 23;
  bits = (offset & 0x007fffff) + 0x3f3504f3;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float f = m - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f - 0.5f * f * f + p * f * f * f + static_cast<float>(exponent) * 0.69314718f;
}

// Brings rows from the step they were last updated at to `step`.
inline void catch_up(const Rows *table, const Rule *rule, const Curves *curves, const int64_t *rows, int64_t count,
                     int64_t step) {
  const float decay = rule->weight_decay, eps = rule->eps * rule->unbias, eps2 = rule->eps * rule->eps;
  const float tiny = 1e-30f;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[i], since = table->updated[row], missed = step - since;
    if (missed == 0) continue;
    table->updated[row] = static_cast<int32_t>(step);
    float *__restrict weight = table->weight + row * table->width;
    float *__restrict first = table->first + row * table->width;
    float *__restrict second = table->second + row * table->width;
    const float decay1 = curves->decay1[missed], decay2 = curves->decay2[missed];
    const float reach = rule->learning_rate * (curves->tail[since] - curves->ratio[missed] * curves->tail[step]);
    if (decay == 0.0f) {
      for (int64_t j = 0; j < table->width; ++j) {
        weight[j] -= reach * first[j] / (std::sqrt(second[j]) + eps);
        first[j] *= decay1;
        second[j] *= decay2;
      }
      continue;
    }
    const float bias1 = curves->decay1[since], bias2 = curves->decay2[since], ramp = curves->ramp[missed];
    const float unbias = 1.0f / std::fmax(1.0f - bias2, tiny);
    const float fade = decay2 * (1.0f - bias2) / (1.0f - bias2 * decay2);
    const float bend = 2.0f / -std::log(std::fmax(fade, tiny));
    const float pace =
        rule->learning_rate * decay * static_cast<float>(missed) * ramp / (1.0f - bias1 * (1.0f - ramp));
    for (int64_t j = 0; j < table->width; ++j) {
      const float w = weight[j], m = first[j], v = second[j];
      const float pull = decay * w, pull2 = pull * pull, base = pull2 + eps2;
      const float excess = (v * unbias - pull2) / base;
      const float start2 = 1.0f + excess, stop2 = 1.0f + excess * fade;
      const float start = std::sqrt(start2 > 0.0f ? start2 : 0.0f), stop = std::sqrt(stop2 > 0.0f ? stop2 : 0.0f);
      const float share = 1.0f + bend * logarithm((stop + 1.0f) / (start + 1.0f));
      const float exponent = -pace * share / std::sqrt(base);
      const float end = (w - reach * m / (std::sqrt(v) + eps)) * exponential(exponent < 0.0f ? exponent : 0.0f);
      weight[j] = end;
      first[j] = decay1 * m + (1.0f - decay1) * decay * end;
      second[j] = decay2 * v + (1.0f - decay2) * pull * decay * end;
    }
  }
}

// One step on rows.
inline void update(const Rows *table, const Rule *rule, const int64_t *rows, int64_t count, const int32_t *place,
                   int64_t places, const float *gradients, float *sums, int64_t step) {
  const int64_t width = table->width;
  std::memset(sums, 0, sizeof(float) * count * width);
  for (int64_t i = 0; i < places; ++i) {
    float *__restrict sum = sums + place[i] * width;
    const float *__restrict gradient = gradients + i * width;
    for (int64_t j = 0; j < width; ++j) sum[j] += gradient[j];
  }
  const float rate = rule->learning_rate * rule->rate, eps = rule->eps * rule->unbias;
  const float beta1 = rule->beta1, beta2 = rule->beta2, decay = rule->weight_decay;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[i];
    table->updated[row] = static_cast<int32_t>(step);
    float *__restrict weight = table->weight + row * width;
    float *__restrict first = table->first + row * width;
    float *__restrict second = table->second + row * width;
    const float *__restrict sum = sums + i * width;
    for (int64_t j = 0; j < width; ++j) {
      const float gradient = sum[j] + decay * weight[j];
      const float m = beta1 * first[j] + (1.0f - beta1) * gradient;
      const float v = beta2 * second[j] + (1.0f - beta2) * gradient * gradient;
      first[j] = m;
      second[j] = v;
      weight[j] -= rate * m / (std::sqrt(v) + eps);
    }
  }
}
