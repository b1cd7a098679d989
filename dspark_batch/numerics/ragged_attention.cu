// Attention of a step over a ragged cache, for tensor cores (sm_80 and later) and bfloat16.
//
// One block of threads serves one key head of one slot. Its rows are the query heads that share
// the key head, times the tokens of the step; a warp takes 16 of them. Keys and values come in
// tiles of a few positions, once for all rows, from the first position to the slot's last one and
// no further. The first positions may lie once for all slots. Tiles make up pieces of PIECE
// positions, which whoever compiles this says. A row's sums begin anew with every piece, run over
// its tiles in their order, and are then joined with those of the pieces before.
//
// Few blocks of threads leave most of a GPU idle. Then the pieces of a slot are split over several
// blocks, which write the sums of each piece, and `join_pieces` joins them in the same order by the
// same operations. So a row's bits depend on its own slot only: not on other slots, the width of
// the step, the capacity, or the number of splits.
//
// Layouts of the fragments: PTX ISA, mma.m16n8k16 and ldmatrix. The softmax over tiles is that of
// FlashAttention (Dao et al., 2022).

using Fragment = unsigned[4];  // bfloat16 pairs
using Sums = float[4];         // of rows lane / 4 and lane / 4 + 8, two columns each

constexpr int STAGES = 2;           // tiles in shared memory: one at work, the others on their way
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

// Positions of a tile, so that those of all stages fit into shared memory.
template <int D>
constexpr int TILE_OF = D > 128 ? 16 : 32;

// Floats of a row's part: its sums, and for each of four threads its highest score and its total.
template <int D>
constexpr int PART = D + 8;

// How much of its sums a row keeps when another piece is joined to the pieces before.
struct Shares {
  float before, own;
};

// Takes the higher of two rows' highest scores into `highest`.
__device__ inline Shares shares_of(float& highest, float own) {
  const float higher = fmaxf(highest, own);
  const Shares shares = {exp2f(__fsub_rn(highest, higher)), exp2f(__fsub_rn(own, higher))};
  highest = higher;
  return shares;
}

__device__ inline float joined(float before, float own, Shares shares) {
  return __fmaf_rn(before, shares.before, __fmul_rn(own, shares.own));
}

// Where 8 numbers of a position lie in a tile, so that 8 positions lie in different banks.
template <int D>
__device__ inline int place_of(int position, int chunk) {
  return position * D + (chunk ^ (position & 7)) * 8;
}

template <int D>
__device__ void ragged_attention(
    const __nv_bfloat16* queries,  // [slots, heads, width, D]
    const __nv_bfloat16* keys,     // [slots, kv_heads, capacity - start, D]
    const __nv_bfloat16* values,   // [slots, kv_heads, capacity - start, D]
    const __nv_bfloat16* first_keys,    // [kv_heads, start, D], of all slots
    const __nv_bfloat16* first_values,  // [kv_heads, start, D]
    const bool* mask,              // [slots, 1, width or 1, capacity]
    const int* lengths,            // [slots], cached positions before the step
    float scale,
    __nv_bfloat16* attended,  // [slots, width, heads, D]; not written by several splits
    float* parts,  // [slots, kv_heads, pieces or 1, rows, PART]
    int heads, int kv_heads, int width, int mask_width, int capacity, int start) {
  constexpr int TILE = TILE_OF<D>;
  __shared__ __align__(16) __nv_bfloat16 tiles[STAGES][2][TILE * D];
  const int lane = threadIdx.x % 32, slot = blockIdx.x, kv_head = blockIdx.y;
  const int rows = heads / kv_heads * width;
  const int rows_of_block = blockDim.x / 2, num_groups = (rows + rows_of_block - 1) / rows_of_block;
  const int splits = gridDim.z / num_groups, split = blockIdx.z / num_groups;
  const int row = blockIdx.z % num_groups * rows_of_block + threadIdx.x / 32 * 16 + lane / 4;
  const bool is_row[2] = {row < rows, row + 8 < rows};
  const size_t group = static_cast<size_t>(slot) * kv_heads + kv_head;

  const int extent = min(lengths[slot] + width, capacity);  // nothing behind it is visible
  const int most_pieces = (capacity + PIECE - 1) / PIECE;
  const int own_pieces = (most_pieces + splits - 1) / splits;
  const int first_tile = split * own_pieces * (PIECE / TILE);
  const int end = min(extent, (split + 1) * own_pieces * PIECE);
  const int end_tile = (end + TILE - 1) / TILE;
  if (first_tile >= end_tile) return;

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
    const bool is_first = tile * TILE < start;  // whole tiles are
    const __nv_bfloat16 *some_keys = is_first ? first_keys : keys;
    const __nv_bfloat16 *some_values = is_first ? first_values : values;
    const size_t begin = is_first ? static_cast<size_t>(kv_head) * start
                                  : group * (capacity - start) - start;
    for (int i = threadIdx.x; i < TILE * D / 8; i += blockDim.x) {
      int in_tile = i / (D / 8), chunk = i % (D / 8), position = tile * TILE + in_tile;
      size_t from = (begin + min(position, capacity - 1)) * D + chunk * 8;
      int to = place_of<D>(in_tile, chunk);
      fetch(&tiles[tile % STAGES][0][to], some_keys + from, position < capacity);
      fetch(&tiles[tile % STAGES][1][to], some_values + from, position < capacity);
    }
  };

  // What is joined of the pieces before; of a large head it does not fit beside the rest.
  constexpr bool IN_REGISTERS = D <= 128;
  constexpr int KEPT = IN_REGISTERS ? D / 8 : 1;
  float2 earlier_sums[2][KEPT], earlier_bounds[2];

  Sums out[D / 8] = {};
  float highest[2] = {LOWEST, LOWEST}, total[2] = {0, 0};
  for (int tile = first_tile; tile < first_tile + STAGES - 1; tile++) {
    if (tile < end_tile) fetch_tile(tile);
    end_of_stage();
  }
  for (int tile = first_tile; tile < end_tile; tile++) {
    if (tile + STAGES - 1 < end_tile) fetch_tile(tile + STAGES - 1);
    end_of_stage();
    wait_for_stage();
    __syncthreads();

    uchar2 seen[TILE / 8][2];  // asked for early: they take as long as the products
    for (int n = 0; n < TILE / 8; n++) {
      for (int i = 0; i < 2; i++) {
        const int position = tile * TILE + n * 8 + lane % 4 * 2;
        seen[n][i] = *reinterpret_cast<const uchar2*>(visible[i] + position);
      }
    }
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
        const uchar2 both = seen[n][i / 2];
        bool sees = position < extent && (i % 2 ? both.y : both.x);
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

    const bool is_last = tile + 1 == end_tile;
    if (!is_last && (tile + 1) % (PIECE / TILE) != 0) continue;
    const int piece = tile / (PIECE / TILE);  // which ends here
#pragma unroll
    for (int i = 0; i < 2; i++) {
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
      if (!is_row[i]) continue;
      const int at = row + 8 * i, head = kv_head * (heads / kv_heads) + at / width;
      const size_t place = splits == 1 ? group : group * most_pieces + piece;
      float* part = parts + (place * rows + at) * PART<D>;
      float2* bounds = reinterpret_cast<float2*>(part + D + lane % 4 * 2);
      const bool is_joined = splits == 1 && piece > 0, is_done = splits == 1 && is_last;
      Shares shares = {};
      if (is_joined) {
        float2 earlier = IN_REGISTERS ? earlier_bounds[i] : *bounds;
        shares = shares_of(earlier.x, highest[i]);
        highest[i] = earlier.x;
        total[i] = joined(earlier.y, total[i], shares);
      }
      const size_t to = ((static_cast<size_t>(slot) * width + at % width) * heads + head) * D;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const int column = n * 8 + lane % 4 * 2;
        float2* stored = reinterpret_cast<float2*>(part + column);
        float2 sums = {out[n][2 * i], out[n][2 * i + 1]};
        if (is_joined) {
          const float2 earlier = IN_REGISTERS ? earlier_sums[i][n % KEPT] : *stored;
          sums = {joined(earlier.x, sums.x, shares), joined(earlier.y, sums.y, shares)};
        }
        if (is_done) {
          *reinterpret_cast<unsigned*>(attended + to + column) =
              pair_of(sums.x / total[i], sums.y / total[i]);
        } else if (IN_REGISTERS && splits == 1) {
          earlier_sums[i][n % KEPT] = sums;
        } else {
          *stored = sums;
        }
        out[n][2 * i] = out[n][2 * i + 1] = 0;
      }
      if (IN_REGISTERS && splits == 1) {
        earlier_bounds[i] = {highest[i], total[i]};
      } else if (!is_done) {
        *bounds = {highest[i], total[i]};
      }
      highest[i] = LOWEST;
      total[i] = 0;
    }
  }
}

// Joins what several splits have written. Each thread has two columns of a row.
template <int D>
__device__ void join_pieces(
    const float* parts,  // [slots, kv_heads, pieces, rows, PART], as `ragged_attention` leaves it
    const int* lengths,  // [slots]
    __nv_bfloat16* attended,  // [slots, width, heads, D]
    int slots, int kv_heads, int pieces, int rows, int width) {
  const int number = blockIdx.x * blockDim.x + threadIdx.x;
  if (number >= slots * kv_heads * rows * (D / 2)) return;
  const int column = number % (D / 2) * 2, at = number / (D / 2) % rows;
  const int group = number / (D / 2) / rows, slot = group / kv_heads;
  const int count = min((lengths[slot] + width + PIECE - 1) / PIECE, pieces);
  float2 sums, bounds;
  for (int piece = 0; piece < count; piece++) {
    const size_t place = static_cast<size_t>(group) * pieces + piece;
    const float* part = parts + (place * rows + at) * PART<D>;
    const float2 own = *reinterpret_cast<const float2*>(part + column);
    const float2 own_bounds = *reinterpret_cast<const float2*>(part + D);
    if (piece == 0) {
      sums = own;
      bounds = own_bounds;
      continue;
    }
    const Shares shares = shares_of(bounds.x, own_bounds.x);
    bounds.y = joined(bounds.y, own_bounds.y, shares);
    sums = {joined(sums.x, own.x, shares), joined(sums.y, own.y, shares)};
  }
  const int groups = rows / width, head = group % kv_heads * groups + at / width;
  const size_t to = ((static_cast<size_t>(slot) * width + at % width) * kv_heads * groups + head) * D;
  *reinterpret_cast<unsigned*>(attended + to + column) =
      pair_of(sums.x / bounds.y, sums.y / bounds.y);
}
