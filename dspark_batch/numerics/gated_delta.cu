// The gated delta rule over the tokens of a step, one after the other.
//
// One block of threads serves 32 rows of the state of one value head of one slot; four threads
// share a row, each of which holds every fourth run of four columns. A row's sums are taken in one
// order, whatever else is in the batch and however many tokens the step has, so the bits of a
// slot's state depend on its own tokens only. Tokens come into shared memory sixteen at a time.

constexpr int ROWS = 32;    // of a state, that a block holds
constexpr int LANES = 4;    // threads that share a row
constexpr int TOKENS = 16;  // in shared memory at a time

__device__ inline float sum_of_lanes(float part) {
  part += __shfl_xor_sync(0xffffffff, part, 1);
  return part + __shfl_xor_sync(0xffffffff, part, 2);
}

template <typename T, typename B, int D>
__device__ void gated_delta(
    const T* queries,     // [slots, width, key_heads, D]
    const T* keys,        // [slots, width, key_heads, D]
    const T* values,      // [slots, width, heads, rows]
    const float* decay,   // [slots, width, heads]
    const B* strength,    // [slots, width, heads]
    const float* before,  // [slots, heads, rows, D]
    const bool* mask,     // [slots, width], which tokens change the state
    T* outputs,           // as the values
    float* after,         // as before
    int width, int key_heads, int heads, int rows) {
  constexpr int OWN = D / LANES;
  __shared__ float key[TOKENS][D], query[TOKENS][D], value[TOKENS][ROWS];
  __shared__ float gate[TOKENS], beta[TOKENS];
  __shared__ bool happens[TOKENS];
  const int lane = threadIdx.x % LANES, in_block = threadIdx.x / LANES;
  const int slot = blockIdx.x, head = blockIdx.y, first_row = blockIdx.z * ROWS;
  const int key_head = head / (heads / key_heads);
  const bool is_row = first_row + in_block < rows;
  const size_t group = static_cast<size_t>(slot) * heads + head;
  const size_t at = (group * rows + first_row + in_block) * D;

  float state[OWN];
  for (int i = 0; i < OWN; i++) {
    state[i] = is_row ? before[at + i / 4 * 16 + lane * 4 + i % 4] : 0;
  }
  for (int start = 0; start < width; start += TOKENS) {
    const int count = min(TOKENS, width - start);
    const size_t first = static_cast<size_t>(slot) * width + start;
    __syncthreads();  // the tokens before are read
    for (int i = threadIdx.x; i < count * D; i += blockDim.x) {
      size_t from = ((first + i / D) * key_heads + key_head) * D + i % D;
      key[i / D][i % D] = static_cast<float>(keys[from]);
      query[i / D][i % D] = static_cast<float>(queries[from]);
    }
    for (int i = threadIdx.x; i < count * ROWS; i += blockDim.x) {
      int row = first_row + i % ROWS;
      size_t from = ((first + i / ROWS) * heads + head) * rows + row;
      value[i / ROWS][i % ROWS] = row < rows ? static_cast<float>(values[from]) : 0;
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      gate[i] = decay[(first + i) * heads + head];
      beta[i] = static_cast<float>(strength[(first + i) * heads + head]);
      happens[i] = mask[first + i];
    }
    __syncthreads();

    for (int token = 0; token < count; token++) {
      float next[OWN], read = 0, out = 0;
      for (int i = 0; i < OWN; i++) {
        next[i] = state[i] * gate[token];
        read += next[i] * key[token][i / 4 * 16 + lane * 4 + i % 4];
      }
      const float delta = (value[token][in_block] - sum_of_lanes(read)) * beta[token];
      for (int i = 0; i < OWN; i++) {
        next[i] += key[token][i / 4 * 16 + lane * 4 + i % 4] * delta;
        out += next[i] * query[token][i / 4 * 16 + lane * 4 + i % 4];
      }
      out = sum_of_lanes(out);
      if (lane == 0 && is_row) {
        size_t to = ((first + token) * heads + head) * rows + first_row + in_block;
        outputs[to] = static_cast<T>(out);
      }
      for (int i = 0; i < OWN; i++) state[i] = happens[token] ? next[i] : state[i];
    }
  }
  for (int i = 0; i < OWN && is_row; i++) {
    after[at + i / 4 * 16 + lane * 4 + i % 4] = state[i];
  }
}
