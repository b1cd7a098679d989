// Attention of a step over a ragged cache, for tensor cores (sm_80 and later) and bfloat16.
//
// One block of threads serves one key head of one slot. Its rows are the query heads that share
// the key head, times the tokens of the step; a warp takes 16 of them. Keys and values come in
// tiles of 32 positions, once for all rows, from the first position to the slot's last one and no
// further. A row's sums run over the tiles in their order, whatever else is in the batch, so its
// bits depend on its own slot only: not on other slots, the width of the step, or the capacity.
//
// Layouts of the fragments: PTX ISA, mma.m16n8k16 and ldmatrix. The softmax over tiles is that of
// FlashAttention (Dao et al., 2022).

using Fragment = unsigned[4];  // bfloat16 pairs
using Sums = float[4];         // of rows lane / 4 and lane / 4 + 8, two columns each

constexpr int TILE = 32;    // positions
constexpr int STAGES = 2;   // tiles in shared memory: one at work, the others on their way
constexpr float LOWEST = -3.0e38f;  // of what is not visible
constexpr float LOG2_E = 1.4426950408889634f;

__device__ inline unsigned shared_address(const void* place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// Sends 16 bytes on their way into shared memory; zeros where there is nothing.
__device__ inline void fetch(void* to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(is_there ? 16 : 0));
}

__device__ inline void end_of_stage() { asm volatile("cp.async.commit_group;"); }

// Waits for all stages but those that are fetched ahead.
__device__ inline void wait_for_stage() {
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
}

__device__ inline void load(Fragment& to, const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)));
}

__device__ inline void load_transposed(Fragment& to, const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)));
}

__device__ inline void add_product(Sums& sums, const Fragment& a, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline unsigned pair_of(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Where 8 numbers of a position lie in a tile, so that 8 positions lie in different banks.
template <int D>
__device__ inline int place_of(int position, int chunk) {
  return position * D + (chunk ^ (position & 7)) * 8;
}

template <int D>
__device__ void ragged_attention(
    const __nv_bfloat16* queries,  // [slots, heads, width, D]
    const __nv_bfloat16* keys,     // [slots, kv_heads, capacity, D]
    const __nv_bfloat16* values,   // [slots, kv_heads, capacity, D]
    const bool* mask,              // [slots, 1, width or 1, capacity]
    const int* lengths,            // [slots], cached positions before the step
    float scale,
    __nv_bfloat16* attended,  // [slots, width, heads, D]
    int heads, int kv_heads, int width, int mask_width, int capacity) {
  __shared__ __align__(16) __nv_bfloat16 tiles[STAGES][2][TILE * D];
  const int lane = threadIdx.x % 32, slot = blockIdx.x, kv_head = blockIdx.y;
  const int rows = heads / kv_heads * width;
  const int row = (blockIdx.z * (blockDim.x / 32) + threadIdx.x / 32) * 16 + lane / 4;
  const bool is_row[2] = {row < rows, row + 8 < rows};
  const size_t group = static_cast<size_t>(slot) * kv_heads + kv_head;

  Fragment query[D / 16];
  for (int k = 0; k < D / 16; k++) {
    for (int i = 0; i < 4; i++) {
      size_t at = (group * rows + row + i % 2 * 8) * D + k * 16 + i / 2 * 8 + lane % 4 * 2;
      query[k][i] = is_row[i % 2] ? *reinterpret_cast<const unsigned*>(queries + at) : 0;
    }
  }
  const bool* visible[2];
  for (int i = 0; i < 2; i++) {
    int token = mask_width == 1 || !is_row[i] ? 0 : (row + 8 * i) % width;
    visible[i] = mask + (static_cast<size_t>(slot) * mask_width + token) * capacity;
  }
  auto fetch_tile = [&](int tile) {
    for (int i = threadIdx.x; i < TILE * D / 8; i += blockDim.x) {
      int in_tile = i / (D / 8), chunk = i % (D / 8), position = tile * TILE + in_tile;
      size_t from = (group * capacity + min(position, capacity - 1)) * D + chunk * 8;
      int to = place_of<D>(in_tile, chunk);
      fetch(&tiles[tile % STAGES][0][to], keys + from, position < capacity);
      fetch(&tiles[tile % STAGES][1][to], values + from, position < capacity);
    }
  };

  const int extent = min(lengths[slot] + width, capacity);  // nothing behind it is visible
  const int num_tiles = (extent + TILE - 1) / TILE;
  Sums out[D / 8] = {};
  float highest[2] = {LOWEST, LOWEST}, total[2] = {0, 0};
  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < num_tiles) fetch_tile(tile);
    end_of_stage();
  }
  for (int tile = 0; tile < num_tiles; tile++) {
    if (tile + STAGES - 1 < num_tiles) fetch_tile(tile + STAGES - 1);
    end_of_stage();
    wait_for_stage();
    __syncthreads();

    Sums score[TILE / 8] = {};
    for (int k = 0; k < D / 16; k++) {
      for (int n = 0; n < TILE / 16; n++) {
        Fragment key;
        int position = n * 16 + lane / 16 * 8 + lane % 8;
        load(key, &tiles[tile % STAGES][0][place_of<D>(position, k * 2 + lane / 8 % 2)]);
        add_product(score[2 * n], query[k], key[0], key[1]);
        add_product(score[2 * n + 1], query[k], key[2], key[3]);
      }
    }

    float before[2] = {highest[0], highest[1]};
    for (int n = 0; n < TILE / 8; n++) {
      for (int i = 0; i < 4; i++) {
        int position = tile * TILE + n * 8 + lane % 4 * 2 + i % 2;
        bool sees = position < extent && visible[i / 2][position];
        score[n][i] = sees ? score[n][i] * (scale * LOG2_E) : LOWEST;
        highest[i / 2] = max(highest[i / 2], score[n][i]);
      }
    }
    for (int i = 0; i < 2; i++) {
      highest[i] = max(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 1));
      highest[i] = max(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 2));
      float shrinks = exp2f(before[i] - highest[i]);
      total[i] *= shrinks;
      for (int n = 0; n < D / 8; n++) {
        out[n][2 * i] *= shrinks;
        out[n][2 * i + 1] *= shrinks;
      }
    }
    for (int n = 0; n < TILE / 8; n++) {
      for (int i = 0; i < 4; i++) {
        // NaN is not LOWEST, so that it stays.
        score[n][i] = score[n][i] == LOWEST ? 0 : exp2f(score[n][i] - highest[i / 2]);
        total[i / 2] += score[n][i];
      }
    }

    for (int k = 0; k < TILE / 16; k++) {
      const Sums &left = score[2 * k], &right = score[2 * k + 1];
      Fragment weight = {pair_of(left[0], left[1]), pair_of(left[2], left[3]),
                         pair_of(right[0], right[1]), pair_of(right[2], right[3])};
      for (int n = 0; n < D / 16; n++) {
        Fragment value;
        int position = k * 16 + lane % 16;
        load_transposed(value, &tiles[tile % STAGES][1][place_of<D>(position, n * 2 + lane / 16)]);
        add_product(out[2 * n], weight, value[0], value[1]);
        add_product(out[2 * n + 1], weight, value[2], value[3]);
      }
    }
    __syncthreads();  // before the stage is fetched anew
  }

  for (int i = 0; i < 2; i++) {
    total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
    total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
    if (!is_row[i]) continue;
    int at = row + 8 * i, head = kv_head * (heads / kv_heads) + at / width;
    size_t to = ((static_cast<size_t>(slot) * width + at % width) * heads + head) * D;
    for (int n = 0; n < D / 8; n++) {
      *reinterpret_cast<unsigned*>(attended + to + n * 8 + lane % 4 * 2) =
          pair_of(out[n][2 * i] / total[i], out[n][2 * i + 1] / total[i]);
    }
  }
}
