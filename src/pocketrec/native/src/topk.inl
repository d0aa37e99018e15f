// The best items of each user by inner product; compiled once per instruction set.

constexpr int64_t USERS = 64;             // users that share one pass over the items
constexpr int GROUP = LANES == 16 ? 8 : 4;  // users in registers
constexpr int PANEL = 2 * LANES;          // items in registers

// Items (item_count, width) -> (panels, width, PANEL), zeros behind the last item.
inline void pack_panels(const float *items, int64_t item_count, int64_t width, float *panels) {
  const int64_t count = (item_count + PANEL - 1) / PANEL;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < width; ++c)
      for (int lane = 0; lane < PANEL; ++lane) {
        const int64_t item = p * PANEL + lane;
        *panels++ = item < item_count ? items[item * width + c] : 0.0f;
      }
}

// Bit i: values[i] > bound.
inline uint32_t above(Floats values, float bound) {
#if POCKETREC_LANES == 16
  return _mm512_cmp_ps_mask(load<__m512>(&values), _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif POCKETREC_LANES == 8
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(load<__m256>(&values), _mm256_set1_ps(bound), _CMP_GT_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= static_cast<uint32_t>(values[lane] > bound) << lane;
  return bits;
#endif
}

// One user's best items so far, best first; equal scores keep the order of arrival, which is the order of ids.
struct Best {
  float *scores;
  int32_t *ids;
  int64_t k, count;
  const int32_t *seen_begin, *seen_end;

  float bound() const { return count < k ? -std::numeric_limits<float>::infinity() : scores[k - 1]; }

  void offer(float score, int32_t id) {
    if (!(score > bound()) || std::binary_search(seen_begin, seen_end, id)) return;
    int64_t place = count < k ? count++ : k - 1;
    for (; place > 0 && score > scores[place - 1]; --place) {
      scores[place] = scores[place - 1];
      ids[place] = ids[place - 1];
    }
    scores[place] = score;
    ids[place] = id;
  }
};

inline void score_panel(const TopK &task, const float *const *users, const float *panel, Floats (&sums)[GROUP][2]) {
  for (int g = 0; g < GROUP; ++g) sums[g][0] = sums[g][1] = Floats{};
  for (int64_t c = 0; c < task.width; ++c) {
    const Floats low = load_floats(panel + c * PANEL), high = load_floats(panel + c * PANEL + LANES);
    for (int g = 0; g < GROUP; ++g) {
      sums[g][0] += users[g][c] * low;
      sums[g][1] += users[g][c] * high;
    }
  }
}

inline void offer_all(const TopK &task, int64_t first, Floats sums, Best *best) {
  for (uint32_t bits = above(sums, best->bound()); bits != 0; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    if (first + lane < task.item_count) best->offer(sums[lane], static_cast<int32_t>(first + lane));
  }
}

// Empty lists of users [begin, end).
inline bool open_lists(const TopK &task, int64_t begin, int64_t end, Best *best) {
  for (int64_t u = begin; u < end; ++u) {
    int64_t from = 0, to = 0;
    if (task.seen.indptr != nullptr && !task.seen.row(u, &from, &to)) return false;
    const int32_t *seen = task.seen.indices;
    best[u - begin] = {task.scores + u * task.k, task.ids + u * task.k, task.k, 0, seen + from, seen + to};
  }
  return true;
}

// Places that no item was left for.
inline void close_lists(Best *best, int64_t count) {
  for (Best *b = best; b < best + count; ++b)
    for (int64_t place = b->count; place < b->k; ++place) {
      b->scores[place] = -std::numeric_limits<float>::infinity();
      b->ids[place] = -1;
    }
}

// Best items of users [begin, end), at most USERS of them.
inline bool topk_block(const TopK &task, int64_t begin, int64_t end) {
  Best best[USERS];
  if (!open_lists(task, begin, end, best)) return false;
  const int64_t panels = (task.item_count + PANEL - 1) / PANEL;
  for (int64_t p = 0; p < panels; ++p) {
    const float *panel = task.panels + p * task.width * PANEL;
    for (int64_t g = begin; g < end; g += GROUP) {
      const float *users[GROUP];
      for (int i = 0; i < GROUP; ++i) users[i] = task.users + std::min(g + i, end - 1) * task.width;
      Floats sums[GROUP][2];
      score_panel(task, users, panel, sums);
      for (int i = 0; i < GROUP && g + i < end; ++i)
        for (int half = 0; half < 2; ++half)
          offer_all(task, p * PANEL + half * LANES, sums[i][half], &best[g + i - begin]);
    }
  }
  close_lists(best, end - begin);
  return true;
}

int topk(const TopK &unpacked, const float *items, int threads) {
  TopK task = unpacked;
  const int64_t panels = (task.item_count + PANEL - 1) / PANEL;
  std::unique_ptr<float[]> packed(new (std::nothrow) float[panels * PANEL * task.width + 1]);
  if (packed == nullptr) return NO_MEMORY;
  pack_panels(items, task.item_count, task.width, packed.get());
  task.panels = packed.get();
  std::atomic<int> status{OK};
  parallel(threads, task.user_count, USERS, [&](int64_t begin, int64_t end) {
    if (!topk_block(task, begin, end)) status.store(BAD_INDEX);
  });
  return status.load();
}
