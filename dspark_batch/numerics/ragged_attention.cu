// Attention of a step over a ragged cache, for tensor cores (sm_80 and later) and bfloat16.
//
// One block of threads serves one key head of one slot. Its rows are the query heads that share
// the key head, times the tokens of the step; a warp takes 16 of them. Keys and values come in
// tiles of a few positions, once for all rows, up to the slot's last position and no further. Tiles
// make up pieces of PIECE positions, which whoever compiles this says. A row's sums begin anew with
// every piece, run over its tiles in their order, and are then joined with those of the pieces
// before.
//
// The first positions, whole pieces, may lie once for all slots. Then blocks of a launch of their
// own take rows of several slots over these (TOGETHER), so that a tile is fetched once for many
// rows, and leave their sums; each slot's blocks go on from there. Or a slot's blocks read them.
//
// Few blocks of threads leave most of a GPU idle. Then pieces are split over several blocks, which
// write the sums of each piece. They are joined in the same order by the same operations: those of
// TOGETHER by the slot's blocks, others by `join_pieces`. So a row's bits depend on its own slot
// only: not on other slots, the width of the step, the capacity, or the number of splits.
//
// Layouts of the fragments: PTX ISA, mma.m16n8k16 and ldmatrix. The softmax over tiles is that of
// FlashAttention (Dao et al., 2022).

using Fragment = unsigned[4];  // bfloat16 pairs
using Sums = float[4];         // of rows lane / 4 and lane / 4 + 8, two columns each

constexpr float LOWEST = -3.0e38f;  // of what is not visible
constexpr float LOG2_E = 1.4426950408889634f;

__device__ inline unsigned shared_address(const void* place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// Sends 16 bytes on their way into shared memory.
__device__ inline void fetch(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

__device__ inline void end_of_stage() { asm volatile("cp.async.commit_group;"); }

// Waits for all stages but the last ones.
template <int LAST>
__device__ inline void wait_for_stages() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LAST));
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

template <int D, bool TOGETHER>
__device__ void ragged_attention(
    const __nv_bfloat16* queries,  // [slots, heads, width, D]
    const __nv_bfloat16* keys,     // [slots, kv_heads, capacity - start, D]
    const __nv_bfloat16* values,   // [slots, kv_heads, capacity - start, D]
    const __nv_bfloat16* first_keys,    // [kv_heads, start, D], of all slots
    const __nv_bfloat16* first_values,  // [kv_heads, start, D]
    const unsigned* mask,     // [slots, 1, width or 1, capacity / 32], the first in the lowest bit
    const int* lengths,       // [slots], cached positions before the step
    float scale,
    const float* begun,       // [slots, kv_heads, begun_pieces, rows, PART], left by TOGETHER
    __nv_bfloat16* attended,  // [slots, width, heads, D]; not written by several splits
    float* parts,             // [slots, kv_heads, pieces or 1, rows, PART]
    int slots, int heads, int kv_heads, int width, int mask_width, int capacity, int start,
    int begun_pieces) {
  constexpr int TILE = TILE_OF<D>;
  constexpr int STAGES = TOGETHER ? 3 : 2;  // tiles: one at work, the others on their way
  // What is joined of the pieces before: rows of several slots and large heads have no room for it.
  constexpr bool IN_REGISTERS = D <= 128 && !TOGETHER;
  constexpr int KEPT = IN_REGISTERS ? D / 8 : 1;
  __shared__ __align__(16) __nv_bfloat16 tiles[STAGES][2][TILE * D];
  const int lane = threadIdx.x % 32, kv_head = blockIdx.y;
  const int rows = heads / kv_heads * width, all_rows = TOGETHER ? slots * rows : rows;
  const int rows_of_block = blockDim.x / 2;
  const int num_groups = (all_rows + rows_of_block - 1) / rows_of_block;
  const int splits = gridDim.z / num_groups, split = blockIdx.z / num_groups;

  // A lane has two rows, `i` of them 0 and 1: which there are, of which slot, and where there.
  const int row = blockIdx.z % num_groups * rows_of_block + threadIdx.x / 32 * 16 + lane / 4;
  const bool is_row[2] = {row < all_rows, row + 8 < all_rows};
  auto slot_of = [&](int i) { return TOGETHER ? (row + 8 * i) / rows : blockIdx.x; };
  auto place_in_slot = [&](int i) { return TOGETHER ? (row + 8 * i) % rows : row + 8 * i; };
  auto group_of = [&](int i) { return static_cast<size_t>(slot_of(i)) * kv_heads + kv_head; };

  // Nothing behind it is visible; the first positions are in front of the end of every slot.
  const int extent = TOGETHER ? start : min(lengths[blockIdx.x] + width, capacity);
  const int most_pieces = ((TOGETHER ? start : capacity) + PIECE - 1) / PIECE;
  const int own_pieces = (most_pieces + splits - 1) / splits;
  const int first_piece = begun_pieces > 0 ? start / PIECE : split * own_pieces;
  const int first_tile = first_piece * (PIECE / TILE);
  const int end = min(extent, (split + 1) * own_pieces * PIECE);
  const int end_tile = (end + TILE - 1) / TILE;
  if (first_tile >= end_tile) return;

  Fragment query[D / 16];
  for (int k = 0; k < D / 16; k++) {
    for (int i = 0; i < 4; i++) {
      size_t from = (group_of(i % 2) * rows + place_in_slot(i % 2)) * D + k * 16 + i / 2 * 8 +
                    lane % 4 * 2;
      query[k][i] = is_row[i % 2] ? *reinterpret_cast<const unsigned*>(queries + from) : 0;
    }
  }
  const unsigned* visible[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int token = mask_width == 1 ? 0 : place_in_slot(i) % width, slot = is_row[i] ? slot_of(i) : 0;
    visible[i] = mask + (static_cast<size_t>(slot) * mask_width + token) * (capacity / 32);
  }
  auto fetch_tile = [&](int tile) {
    const bool is_first = tile * TILE < start;  // whole tiles are
    const size_t begin = is_first ? static_cast<size_t>(kv_head) * start
                                  : group_of(0) * (capacity - start) - start;
    const __nv_bfloat16* some_keys = (is_first ? first_keys : keys) + begin * D;
    const __nv_bfloat16* some_values = (is_first ? first_values : values) + begin * D;
    const int chunk = threadIdx.x % (D / 8), stage = tile % STAGES;
    for (int position = threadIdx.x / (D / 8); position < TILE; position += blockDim.x / (D / 8)) {
      const int from = (tile * TILE + position) * D + chunk * 8, to = place_of<D>(position, chunk);
      fetch(&tiles[stage][0][to], some_keys + from);
      fetch(&tiles[stage][1][to], some_values + from);
    }
  };

  float2 earlier_sums[2][KEPT], earlier_bounds[2];
  auto begun_of = [&](int i, int piece) {
    return begun + ((group_of(i) * begun_pieces + piece) * rows + place_in_slot(i)) * PART<D>;
  };
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (!IN_REGISTERS || !is_row[i]) continue;
    for (int piece = 0; piece < begun_pieces; piece++) {
      const float* part = begun_of(i, piece);
      const float2 own_bounds = *reinterpret_cast<const float2*>(part + D);
      Shares shares = {};
      if (piece > 0) {
        shares = shares_of(earlier_bounds[i].x, own_bounds.x);
        earlier_bounds[i].y = joined(earlier_bounds[i].y, own_bounds.y, shares);
      } else {
        earlier_bounds[i] = own_bounds;
      }
#pragma unroll
      for (int n = 0; n < KEPT; n++) {
        const float2 own = *reinterpret_cast<const float2*>(part + n * 8 + lane % 4 * 2);
        float2& sums = earlier_sums[i][n];
        if (piece > 0) {
          sums = {joined(sums.x, own.x, shares), joined(sums.y, own.y, shares)};
        } else {
          sums = own;
        }
      }
    }
  }

  Sums out[D / 8] = {};
  float highest[2] = {LOWEST, LOWEST}, total[2] = {0, 0};
  for (int tile = first_tile; tile < first_tile + STAGES - 1; tile++) {
    if (tile < end_tile) fetch_tile(tile);
    end_of_stage();
  }
  for (int tile = first_tile; tile < end_tile; tile++) {
    unsigned seen[2];  // asked for early
    for (int i = 0; i < 2; i++) seen[i] = visible[i][tile * TILE / 32];
    wait_for_stages<STAGES - 2>();
    __syncthreads();  // all have this tile, and are through with the one before it
    if (tile + STAGES - 1 < end_tile) fetch_tile(tile + STAGES - 1);
    end_of_stage();

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
    const int num_visible = min(extent - tile * TILE, TILE);  // of the tile, at most
    for (int i = 0; i < 2; i++) {
      seen[i] = seen[i] >> tile * TILE % 32 & 0xffffffff >> (32 - num_visible);
      seen[i] >>= lane % 4 * 2;
    }
    for (int n = 0; n < TILE / 8; n++) {
      for (int i = 0; i < 4; i++) {
        const bool sees = seen[i / 2] >> (n * 8 + i % 2) & 1;
        score[n][i] = sees ? score[n][i] * (scale * LOG2_E) : LOWEST;
        highest[i / 2] = max(highest[i / 2], score[n][i]);
      }
    }
    for (int i = 0; i < 2; i++) {
      highest[i] = max(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 1));
      highest[i] = max(highest[i], __shfl_xor_sync(0xffffffff, highest[i], 2));
      float shrinks = exp2f(before[i] - highest[i]);
      if (__all_sync(0xffffffff, shrinks == 1)) continue;  // as mostly: nothing would change
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
    const bool is_last = tile + 1 == end_tile;
    if (!is_last && (tile + 1) % (PIECE / TILE) != 0) continue;
    const int piece = tile / (PIECE / TILE);  // which ends here
#pragma unroll
    for (int i = 0; i < 2; i++) {
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 1);
      total[i] += __shfl_xor_sync(0xffffffff, total[i], 2);
      if (!is_row[i]) continue;
      const int at = place_in_slot(i), head = kv_head * (heads / kv_heads) + at / width;
      const size_t place = splits == 1 ? group_of(i) : group_of(i) * most_pieces + piece;
      float* part = parts + (place * rows + at) * PART<D>;
      float2* bounds = reinterpret_cast<float2*>(part + D + lane % 4 * 2);
      const bool is_joined = splits == 1 && piece > 0;
      const bool is_done = !TOGETHER && splits == 1 && is_last;
      const bool is_kept = IN_REGISTERS && splits == 1 && !is_last;
      const float* last = begun_pieces > 0 && piece == first_piece ? begun_of(i, 0) : part;
      Shares shares = {};
      if (is_joined) {
        float2 earlier = IN_REGISTERS
            ? earlier_bounds[i] : *reinterpret_cast<const float2*>(last + D + lane % 4 * 2);
        shares = shares_of(earlier.x, highest[i]);
        highest[i] = earlier.x;
        total[i] = joined(earlier.y, total[i], shares);
      }
      const size_t to =
          ((static_cast<size_t>(slot_of(i)) * width + at % width) * heads + head) * D;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const int column = n * 8 + lane % 4 * 2;
        float2* stored = reinterpret_cast<float2*>(part + column);
        float2 sums = {out[n][2 * i], out[n][2 * i + 1]};
        if (is_joined) {
          const float2 earlier = IN_REGISTERS
              ? earlier_sums[i][n % KEPT] : *reinterpret_cast<const float2*>(last + column);
          sums = {joined(earlier.x, sums.x, shares), joined(earlier.y, sums.y, shares)};
        }
        if (is_done) {
          *reinterpret_cast<unsigned*>(attended + to + column) =
              pair_of(sums.x / total[i], sums.y / total[i]);
        } else if (is_kept) {
          earlier_sums[i][n % KEPT] = sums;
        } else {
          *stored = sums;
        }
        out[n][2 * i] = out[n][2 * i + 1] = 0;
      }
      if (is_kept) {
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
