// Scores of all pairs by a perceptron, compiled once per instruction set.
//
// A panel of items lies across the lanes, so that a pair's score is the same arithmetic wherever the item stands.

// One layer for a panel: in (inputs, PANEL) -> out (outputs, PANEL), weight (outputs, inputs).
inline void dense_layer(const float *weight, const float *bias, int64_t inputs, int64_t outputs, bool clip,
                        const float *in, float *out) {
  for (int64_t o = 0; o < outputs; o += GROUP) {
    const float *rows[GROUP];
    Floats sums[GROUP][2];
    for (int g = 0; g < GROUP; ++g) {
      const int64_t row = std::min(o + g, outputs - 1);
      rows[g] = weight + row * inputs;
      sums[g][0] = sums[g][1] = bias[row] - Floats{};
    }
    for (int64_t c = 0; c < inputs; ++c) {
      const Floats low = load_floats(in + c * PANEL), high = load_floats(in + c * PANEL + LANES);
      for (int g = 0; g < GROUP; ++g) {
        sums[g][0] += rows[g][c] * low;
        sums[g][1] += rows[g][c] * high;
      }
    }
    for (int g = 0; g < GROUP && o + g < outputs; ++g)
      for (int half = 0; half < 2; ++half) {
        const Floats sum = sums[g][half];
        store_floats(out + (o + g) * PANEL + half * LANES, clip ? (sum < 0.0f ? Floats{} : sum) : sum);
      }
  }
}

// First layer for a user and a panel: max(0, (user + item) / (user's count + item's count) + bias), or without counts.
inline void first_layer(const Tower &task, int64_t user, const float *panel, const float *counts, float *out) {
  const float *part = task.users + user * task.width;
  for (int half = 0; half < 2; ++half) {
    Floats scale = 1.0f - Floats{};
    if (counts != nullptr) {
      const Floats count = load_floats(counts + half * LANES) + task.user_counts[user];
      scale = 1.0f / (count < 1.0f ? 1.0f - Floats{} : count);
    }
    for (int64_t c = 0; c < task.width; ++c) {
      const Floats sum = (load_floats(panel + c * PANEL + half * LANES) + part[c]) * scale + task.bias[c];
      store_floats(out + c * PANEL + half * LANES, sum < 0.0f ? Floats{} : sum);
    }
  }
}

// Scores of one user and one panel, in (1, PANEL); the buffers take turns and the last one written comes back.
inline const float *climb(const Tower &task, float *in, float *out) {
  const float *weights = task.weights;
  for (int64_t layer = 0; layer < task.layers; ++layer) {
    const int64_t inputs = task.widths[layer], outputs = task.widths[layer + 1];
    dense_layer(weights, weights + outputs * inputs, inputs, outputs, layer + 1 < task.layers, in, out);
    weights += outputs * (inputs + 1);
    std::swap(in, out);
  }
  return in;
}

int tower(const Tower &task, int threads) {
  constexpr int64_t TOGETHER = 16;  // users that share one pass over the items
  const int64_t panels = (task.item_count + PANEL - 1) / PANEL;
  const int64_t widest = *std::max_element(task.widths, task.widths + task.layers + 1);
  std::unique_ptr<float[]> packed(new (std::nothrow) float[panels * PANEL * task.width + 1]);
  std::unique_ptr<float[]> counts(new (std::nothrow) float[panels * PANEL + 1]);
  if (packed == nullptr || counts == nullptr) return NO_MEMORY;
  pack_panels(task.items, task.item_count, task.width, packed.get());
  if (task.item_counts != nullptr) pack_panels(task.item_counts, task.item_count, 1, counts.get());
  std::atomic<int> status{OK};
  parallel(threads, task.user_count, TOGETHER, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> buffers(new (std::nothrow) float[2 * widest * PANEL + 16]);
    if (buffers == nullptr) return status.store(NO_MEMORY);
    float *first = buffers.get() + (64 - reinterpret_cast<uintptr_t>(buffers.get()) % 64) / sizeof(float);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t left = p * PANEL, count = std::min<int64_t>(PANEL, task.item_count - left);
      const float *held = task.item_counts == nullptr ? nullptr : counts.get() + left;
      for (int64_t user = begin; user < end; ++user) {
        first_layer(task, user, packed.get() + left * task.width, held, first);
        const float *scores = climb(task, first, first + widest * PANEL);
        std::memcpy(task.out + user * task.item_count + left, scores, count * sizeof(float));
      }
    }
  });
  return status.load();
}
