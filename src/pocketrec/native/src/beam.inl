// Beam search for trellis codes; compiled once per instruction set.

constexpr int64_t WIDEST_SPAN = 8;

// What the search holds of one row: beams, candidates, and where each beam came from.
struct BeamSearch {
  struct Candidate {
    float cost;
    int32_t number;  // beam * choices + code
  };

  const Beam &task;
  const int64_t steps, choices, low_states;
  std::vector<float> values;  // (low_states, choices, span): the table, codes of one past together
  std::vector<float> pulls, costs;
  std::vector<int32_t> states, origins;
  std::vector<Candidate> candidates;

  explicit BeamSearch(const Beam &search)
      : task(search), steps((task.width + task.span - 1) / task.span), choices(int64_t{1} << task.bits),
        low_states(int64_t{1} << (task.memory - task.bits)), values(low_states * choices * task.span),
        pulls(2 * task.beams * task.width), costs(2 * task.beams), states(2 * task.beams), origins(steps * task.beams),
        candidates(task.beams * choices) {
    for (int64_t low = 0; low < low_states; ++low)
      for (int64_t code = 0; code < choices; ++code)
        for (int64_t v = 0; v < task.span; ++v)
          values[(low * choices + code) * task.span + v] = task.table[(low + code * low_states) * task.span + v];
  }

  // Costs of all codes after one beam.
  void extend(int64_t row, int64_t first, int64_t span, int64_t beam, float cost, int64_t state, const float *pull) {
    const float *target = task.rows + row * task.width + first, *weights = task.weights + row * task.width + first;
    const float *upper = task.upper + (row * task.width + first) * task.width + first;
    const float *value = values.data() + (state >> task.bits) * choices * task.span;
    const float scale = task.scales[row];
    Candidate *out = candidates.data() + beam * choices;
    if (task.span == 1) {
      const float wanted = target[0] + pull[first], weight = weights[0];
      for (int64_t code = 0; code < choices; ++code) {
        const float error = wanted - scale * value[code];
        out[code] = {cost + weight * error * error, static_cast<int32_t>(beam * choices + code)};
      }
      return;
    }
    for (int64_t code = 0; code < choices; ++code, value += task.span) {
      float errors[WIDEST_SPAN], total = cost;
      for (int64_t v = 0; v < span; ++v) {
        errors[v] = target[v] - scale * value[v];
        float felt = errors[v] + pull[first + v];
        for (int64_t w = 0; w < v; ++w) felt += upper[w * task.width + v] * errors[w];
        total += weights[v] * felt * felt;
      }
      out[code] = {total, static_cast<int32_t>(beam * choices + code)};
    }
  }

  // A candidate as beam `next`: its state, its cost, and what its errors do to later coordinates.
  void keep(int64_t row, int64_t first, int64_t span, const Candidate &chosen, int64_t from, int64_t next) {
    const int64_t parent = from + chosen.number / choices, code = chosen.number % choices;
    const int64_t low = states[parent] >> task.bits;
    states[next] = static_cast<int32_t>(low + code * low_states);
    costs[next] = chosen.cost;
    const float *value = values.data() + (low * choices + code) * task.span, *pull = pulls.data() + parent * task.width;
    const float *upper = task.upper + (row * task.width + first) * task.width;
    float *out = pulls.data() + next * task.width;
    const int64_t begin = first + span;
    std::memcpy(out + begin, pull + begin, (task.width - begin) * sizeof(float));
    for (int64_t v = 0; v < span; ++v, upper += task.width) {
      const float error = task.rows[row * task.width + first + v] - task.scales[row] * value[v];
      for (int64_t i = begin; i < task.width; ++i) out[i] += error * upper[i];
    }
  }

  void run(int64_t row) {
    int64_t from = 0, kept = 1;
    states[0] = 0;
    costs[0] = 0;
    std::fill_n(pulls.begin(), task.width, 0.0f);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t first = step * task.span, span = std::min(task.span, task.width - first), count = kept * choices;
      for (int64_t beam = 0; beam < kept; ++beam)
        extend(row, first, span, beam, costs[from + beam], states[from + beam], pulls.data() + (from + beam) * task.width);
      const int64_t wanted = step + 1 == steps ? 1 : std::min(task.beams, count);
      if (wanted < count)
        std::nth_element(candidates.begin(), candidates.begin() + wanted - 1, candidates.begin() + count,
                         [](const Candidate &a, const Candidate &b) { return a.cost < b.cost; });
      const int64_t next = task.beams - from;
      for (int64_t beam = 0; beam < wanted; ++beam) {
        origins[step * task.beams + beam] = candidates[beam].number;
        keep(row, first, span, candidates[beam], from, next + beam);
      }
      from = next;
      kept = wanted;
    }
    int64_t beam = 0;
    for (int64_t step = steps - 1; step >= 0; --step) {
      const int32_t origin = origins[step * task.beams + beam];
      task.codes[row * steps + step] = static_cast<uint8_t>(origin % choices);
      beam = origin / choices;
    }
  }
};

int beam(const Beam &task) {
  try {
    BeamSearch search(task);
    for (int64_t row = 0; row < task.count; ++row) search.run(row);
  } catch (const std::bad_alloc &) {
    return NO_MEMORY;
  }
  return OK;
}
