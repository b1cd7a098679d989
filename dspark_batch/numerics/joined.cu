// What lies between the products of a decoder layer, one kernel where MLX has several, bit for bit.
//
// Every row is computed by itself, by the operations of MLX's own kernels in their order: sums of
// squares as its rms_norm adds them, angles and turns as its rope does, activations as its sigmoid
// and exp do, each operation rounded by itself. Arrays are bfloat16, sums float32. Rows beyond
// `total` are copies of the others: a product that follows may need more rows than there are.

using Number = __nv_bfloat16;

constexpr int RUN = 8;  // numbers that a thread has at a time, 16 bytes

struct alignas(16) Run {
  Number at[RUN];
};

__device__ inline Run run_at(const Number* from) { return *reinterpret_cast<const Run*>(from); }

__device__ inline float squares_of(const Run& run, float sum) {
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    const float number = static_cast<float>(run.at[i]);
    sum += number * number;
  }
  return sum;
}

template <int LANES>
__device__ inline float sum_over(float own) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    own += __shfl_xor_sync(0xffffffff, own, mask, LANES);
  }
  return own;
}

__device__ inline Number normalised(Number number, Number weight, float factor) {
  return weight * static_cast<Number>(static_cast<float>(number) * factor);
}

// Splits a joined product into heads, normalises and turns queries and keys, and puts keys and
// values into the cache, if there is one, else into arrays of their own. A block of threads has a
// token; D / 8 threads have a head of it.
template <int D, int TURNED, bool HAS_NORMS, bool HAS_PERIODS, bool INTO_CACHE>
__device__ void split_heads(
    const Number* joined,         // [at least slots * width, (heads + 2 * kv_heads) * D]
    const Number* query_weight,   // [D], as the next
    const Number* key_weight,
    const float* periods,         // [TURNED / 2], of the turns
    const int* offsets,           // [slots], position of each slot's first token
    float epsilon, float scale, float log2_base,  // of norms, of positions, of the turns
    Number* queries,              // [slots, heads, width, D]
    Number* keys,                 // [slots, kv_heads, capacity, D], as the next
    Number* values,
    int heads, int kv_heads, int width, int capacity, int start) {  // position of the first key
  constexpr int LANES = D / RUN, HALF = TURNED / 2, APART = HALF / RUN;
  __shared__ float cosines[HALF], sines[HALF];
  const int row = blockIdx.x, slot = row / width, token = row % width;
  for (int i = threadIdx.x; i < HALF; i += blockDim.x) {
    float frequency;
    if constexpr (HAS_PERIODS) {
      frequency = 1.0 / periods[i];
    } else {
      const float part = static_cast<float>(i) / static_cast<float>(HALF);
      frequency = exp2f(-part * log2_base);
    }
    const float place = scale * static_cast<float>(token + offsets[slot]);
    const float angle = place * frequency;
    cosines[i] = cosf(angle);
    sines[i] = sinf(angle);
  }
  __syncthreads();

  const int lane = threadIdx.x % LANES, all = heads + 2 * kv_heads, at_once = blockDim.x / LANES;
  const int partner = lane < APART ? lane + APART : lane - APART;
  const bool turns = lane < 2 * APART, is_first = lane < APART;
  const int place = INTO_CACHE ? offsets[slot] + token - start : token;
  for (int first = 0; first < all; first += at_once) {
    const int head = first + threadIdx.x / LANES;
    const bool is_there = head < all, is_query = head < heads, is_value = head >= heads + kv_heads;
    Run run = {};
    if (is_there) run = run_at(joined + (static_cast<size_t>(row) * all + head) * D + lane * RUN);
    if constexpr (HAS_NORMS) {
      const float sum = sum_over<LANES>(squares_of(run, 0));
      const float factor = rsqrtf(sum / static_cast<float>(D) + epsilon);
      if (!is_value) {
        const Run weight = run_at((is_query ? query_weight : key_weight) + lane * RUN);
#pragma unroll
        for (int i = 0; i < RUN; i++) run.at[i] = normalised(run.at[i], weight.at[i], factor);
      }
    }
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      const float own = static_cast<float>(run.at[i]);
      const float other = __shfl_sync(0xffffffff, own, partner, LANES);
      if (!turns || is_value) continue;
      const int at = (is_first ? lane : lane - APART) * RUN + i;
      const float x1 = is_first ? own : other, x2 = is_first ? other : own;
      const float turned1 = x1 * cosines[at] - x2 * sines[at];
      const float turned2 = x1 * sines[at] + x2 * cosines[at];
      run.at[i] = static_cast<Number>(is_first ? turned1 : turned2);
    }
    if (!is_there) continue;
    Number* to;
    if (is_query) {
      to = queries + ((static_cast<size_t>(slot) * heads + head) * width + token) * D;
    } else {
      const int kv_head = is_value ? head - heads - kv_heads : head - heads;
      const size_t group = static_cast<size_t>(slot) * kv_heads + kv_head;
      if (place < 0 || place >= capacity) continue;  // nothing outside a slot's own room is touched
      to = (is_value ? values : keys) + (group * capacity + place) * D;
    }
    *reinterpret_cast<Run*>(to + lane * RUN) = run;
  }
}

// Activates by silu, in the numbers' own type or in float32.
template <bool IS_WIDE>
__device__ inline Number activated(Number number) {
  if constexpr (IS_WIDE) {
    const float own = static_cast<float>(number);
    const float wide = isnan(own) || own > -88.0f ? own : -88.0f;
    return static_cast<Number>(wide / (1.0f + expf(-wide)));
  } else {
    const Number most = static_cast<Number>(1.0f + static_cast<float>(hexp(__habs(number))));
    const Number part = static_cast<Number>(1.0f / static_cast<float>(most));
    const bool is_below = static_cast<float>(number) < 0.0f;
    return number * (is_below ? part : static_cast<Number>(1.0f - static_cast<float>(part)));
  }
}

// Activates the first half of a joined product, and multiplies the second half by it. A thread has
// a run of a row. In PARTS the first columns of all rows lie in front of the others.
template <bool IS_WIDE, int PARTS>
__device__ inline void gate(
    const Number* joined,  // [at least total, 2 * size]
    Number* gated,         // [PARTS, rows, size / PARTS]
    int total, int rows, int size) {
  const size_t number = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int runs = size / RUN;
  if (number >= static_cast<size_t>(rows) * runs) return;
  const size_t row = number / runs, column = number % runs * RUN;
  const Number* from = joined + row % total * 2 * size + column;
  const Run gates = run_at(from), ups = run_at(from + size);
  Run run;
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    run.at[i] = activated<IS_WIDE>(gates.at[i]) * ups.at[i];
  }
  const size_t width = size / PARTS, part = column / width;
  *reinterpret_cast<Run*>(gated + (part * rows + row) * width + column % width) = run;
}

// Adds two arrays, of which the second may be two to be added before, and normalises the sum. A
// block of THREADS has a row, a thread CHUNKS runs of it; where there are none it adds zeros.
template <int SIZE, int THREADS, int CHUNKS, int PARTS>
__device__ void add_and_normalise(
    const Number* left,    // [at least total, SIZE]
    const Number* right,   // [PARTS, others, SIZE], others at least total
    const Number* weight,  // [SIZE]
    float epsilon,
    Number* sums,       // [total, SIZE]
    Number* normalised_sums,  // [rows, SIZE]
    int total, int others) {
  static_assert(PARTS == 1 || PARTS == 2);
  __shared__ float parts[THREADS / 32];
  const int row = blockIdx.x, source = row % total;
  Run run[CHUNKS] = {};
  float own = 0;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int column = (chunk * THREADS + threadIdx.x) * RUN;
    if (column >= SIZE) continue;
    const size_t at = static_cast<size_t>(source) * SIZE + column;
    run[chunk] = run_at(left + at);
    Run other = run_at(right + at);
    if constexpr (PARTS == 2) {
      const Run second = run_at(right + static_cast<size_t>(others) * SIZE + at);
#pragma unroll
      for (int i = 0; i < RUN; i++) other.at[i] = other.at[i] + second.at[i];
    }
#pragma unroll
    for (int i = 0; i < RUN; i++) run[chunk].at[i] = run[chunk].at[i] + other.at[i];
    if (row < total) *reinterpret_cast<Run*>(sums + at) = run[chunk];
    own = squares_of(run[chunk], own);
  }
  own = sum_over<32>(own);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
  __syncthreads();
  own = sum_over<32>(threadIdx.x % 32 < THREADS / 32 ? parts[threadIdx.x % 32] : 0);
  const float factor = rsqrtf(own / static_cast<float>(SIZE) + epsilon);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int column = (chunk * THREADS + threadIdx.x) * RUN;
    if (column >= SIZE) continue;
    const Run weights = run_at(weight + column);
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      run[chunk].at[i] = normalised(run[chunk].at[i], weights.at[i], factor);
    }
    *reinterpret_cast<Run*>(normalised_sums + static_cast<size_t>(row) * SIZE + column) = run[chunk];
  }
}

// Puts positions of some slots of one cache into slots of another, and zeros behind them. A thread
// has a run of numbers of both keys and values.
template <int D>
__device__ void insert_slots(
    const Number* other_keys,    // [others, kv_heads, count, D], as the next
    const Number* other_values,
    const int* chosen,           // [slots that change], of the others
    const int* slots,            // [slots that change], of the cache
    Number* keys,                // [slots, kv_heads, capacity, D], as the next
    Number* values,
    Number* done,                // [1], so that what reads the cache may wait for something
    int runs, int kv_heads, int count, int capacity) {
  constexpr int RUNS = D / RUN;
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index == 0) done[0] = Number(0.0f);
  if (index >= runs) return;
  const int part = index % RUNS, position = index / RUNS % capacity;
  const int row = index / RUNS / capacity, head = row % kv_heads, at = row / kv_heads;
  const size_t there = (static_cast<size_t>(slots[at]) * kv_heads + head) * capacity + position;
  const size_t here = (static_cast<size_t>(chosen[at]) * kv_heads + head) * count + position;
  Run found[2] = {};
  if (position < count) {
    found[0] = run_at(other_keys + here * D + part * RUN);
    found[1] = run_at(other_values + here * D + part * RUN);
  }
  *reinterpret_cast<Run*>(keys + there * D + part * RUN) = found[0];
  *reinterpret_cast<Run*>(values + there * D + part * RUN) = found[1];
}
