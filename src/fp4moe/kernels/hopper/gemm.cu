// The GEMMs of experts for Hopper: weights decoded in registers while the tensor cores multiply.
//
// Weights stand on the M side of the tensor core, tokens on its N side. A block of threads stays on
// its multiprocessor and takes one work item after another: a tile of one expert's slots times
// GROUPS * 128 weight rows. One group of four warps only loads: weights by bulk copies, tokens by
// gathering 16 bytes at a time. Each of the other GROUPS has two products of 64 rows in turn: while
// one is in flight, the weights of the next are decoded into the other set of registers.
//
// source.py puts this behind common.cu, load.cu and activation.cu, and defines: GATE_UP, GATED,
// ACTIVATION and its numbers, GROUPS, SLOTS, STAGES, WORDS (a lane's words of a row of a slab),
// SCALE_BYTES (of a row of a slab), ROW_FACTOR, WEIGHT_FACTOR, BIASED; and the functions decode()
// and product().

__device__ __forceinline__ u64 describe(u32 address) {
  // 128-byte swizzle, 1024 bytes from one eight rows to the next.
  return ((u64)1 << 62) | ((u64)64 << 32) | ((u64)1 << 16) | ((address & 0x3FFFF) >> 4);
}

struct Row {
  u32 words[WORDS], scale;
  __device__ __forceinline__ void load(u32 words_at, u32 scales_at, int row, int lane) {
    const u32 at = words_at + row * (16 * WORDS) + lane * (4 * WORDS);
    if (WORDS == 2) {
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(at));
    } else {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[WORDS - 2]), "=r"(words[WORDS - 1])
                   : "r"(at));
    }
    if (SCALE_BYTES == 4) {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(scale) : "r"(scales_at + row * 4));
    } else if (SCALE_BYTES == 2) {
      u16 both;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(both) : "r"(scales_at + row * 2));
      scale = both;
    }
  }
};

// Registers of four products: of rows g and g + 8, columns 2 l and 2 l + 8 of each 16.
__device__ __forceinline__ void decode_rows(const Arguments& arguments, u32 (&a)[16], const Row& first,
                                            const Row& second) {
  u32 low[8], high[8];
  decode(arguments, low, first.words, first.scale);
  decode(arguments, high, second.words, second.scale);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    a[4 * k] = low[2 * k];
    a[4 * k + 1] = high[2 * k];
    a[4 * k + 2] = low[2 * k + 1];
    a[4 * k + 3] = high[2 * k + 1];
  }
}

__device__ __forceinline__ void multiply(float (&sum)[SLOTS / 2], const u32 (&a)[16], u64 tokens) {
  products_begin();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    product(sum, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], tokens + 2 * k);
  }
  products_commit();
}

// Factor of the sums of a row; `half`: 1 for up.
__device__ __forceinline__ float row_factor(const Arguments& a, int expert, int row, int half) {
  if (ROW_FACTOR == 0) return WEIGHT_FACTOR;
  if (ROW_FACTOR == 1) return __ldg(a.global_scale + expert) * WEIGHT_FACTOR;
  const float* scales = (const float*)a.scales;
  if (ROW_FACTOR == 2) return __ldg(scales + expert * PARTS + half);
  return __ldg(scales + (long long)expert * PARTS * a.rows + half * a.rows + row);
}

__device__ __forceinline__ float row_bias(const Arguments& a, int expert, int row, int half) {
  return BIASED ? __ldg(a.bias + (long long)expert * PARTS * a.rows + half * a.rows + row) : 0.0f;
}

// Sums of a thread, in row_of(half, i): rows g and g + 8 of each product; gated: of gate and of up.
__device__ __forceinline__ int row_of(int half, int i) {
  const int warp = threadIdx.x % 128 / 32, line = threadIdx.x % 32 / 4;
  return GATED ? half * 32 + warp * 8 + line : half * 64 + warp * 16 + 8 * i + line;
}

// Where a lane's slots are among an item's: a warp stores every fourth one.
__device__ __forceinline__ int place_of(int i) {
  return 128 * i + threadIdx.x % 32 * 4 + threadIdx.x % 128 / 32;
}

struct Places {
  int slot[FACTORS / 128];
  float weight[FACTORS / 128];
  __device__ __forceinline__ Places(const Arguments& a, const Work& work) {
#pragma unroll
    for (int i = 0; i < FACTORS / 128; ++i) {
      const int place = place_of(i);
      slot[i] = place < work.used ? __ldg(a.order + (long long)work.number * SLOTS + place) : -1;
      weight[i] = !GATE_UP && slot[i] >= 0 ? __ldg(a.routing_weights + slot[i]) : 0.0f;
    }
  }
};

__device__ __forceinline__ void store(const Arguments& a, const Work& work, const Places& places,
                                      u32 shared, int group, float (&sum)[2][SLOTS / 2]) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int first = (work.block * GROUPS + group) * GROUP_ROWS;
  const u32 staged = shared + STAGED_AT + group * STAGED_BYTES;
  const u32 factors = shared + FACTORS_AT + group * 4 * FACTORS;
  // What the item before left here has been read.
  group_barrier(group);
  if (!GATE_UP) {
#pragma unroll
    for (int i = 0; i < FACTORS / 128; ++i) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(factors + 4 * place_of(i)),
                   "f"(places.weight[i])
                   : "memory");
    }
    group_barrier(group);
  }
  float factor[2][2], bias[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(first + row_of(half, i), a.rows - 1);
      factor[half][i] = row_factor(a, work.expert, row, GATED ? i : 0);
      bias[half][i] = row_bias(a, work.expert, row, GATED ? i : 0);
    }
  }
  // Matrices go by half, then by i, or with a gate by block of tokens, then by half.
  const int line = lane % 8, matrix = lane / 8, warp = thread / 32;
  const u32 at = staged + (GATED ? matrix / 2 * 8 + line : line) * STAGED_PITCH +
                 2 * (GATED ? matrix % 2 * 32 + warp * 8
                            : matrix / 2 * 64 + warp * 16 + matrix % 2 * 8);
  u32 pairs[4];
#pragma unroll
  for (int block = 0; block < SLOTS / 8; ++block) {
    float weight[2] = {1.0f, 1.0f};
    if (!GATE_UP) {
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(weight[0]), "=f"(weight[1])
                   : "r"(factors + 4 * (8 * block + 2 * (lane % 4))));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = sum[half][4 * block + i] * factor[half][i / 2];
        if (BIASED) v[i] += bias[half][i / 2];
        if (!GATE_UP) v[i] *= weight[i % 2];
        if (GATE_UP && !GATED) v[i] = combine(v[i], 0.0f);
      }
      if (GATED) {
        pairs[block % 2 * 2 + half] = to_bfloat16(combine(v[2], v[0]), combine(v[3], v[1]));
      } else {
        pairs[half * 2] = to_bfloat16(v[0], v[1]);
        pairs[half * 2 + 1] = to_bfloat16(v[2], v[3]);
      }
    }
    const u32 first = at + block / (GATED ? 2 : 1) * (GATED ? 16 : 8) * STAGED_PITCH;
    if (!GATED || block % 2) {
      put(first, pairs);
    } else if (block == SLOTS / 8 - 1) {
      put(first, pairs[0], pairs[1]);
    }
  }
  group_barrier(group);
  constexpr int LANES = GROUP_ROWS / 8;  // of 16 bytes for a slot's rows
  const int piece = lane % LANES;
  u16* const out = a.out + first + 8 * piece;
#pragma unroll
  for (int i = 0; i < FACTORS / 128; ++i) {
#pragma unroll
    for (int j = 0; j < min(32, (SLOTS - 128 * i + 3) / 4); j += 32 / LANES) {
      const int owner = j + lane / LANES;
      const long long slot = __shfl_sync(0xFFFFFFFF, places.slot[i], owner);
      const u32 from = staged + (128 * i + 4 * owner + warp) * STAGED_PITCH + 16 * piece;
      if (slot >= 0 && first + 8 * piece < a.rows) copy_out(out + slot * a.rows, from);
    }
  }
}

__device__ __forceinline__ void multiply_item(const Arguments& a, const Work& work, u32 shared,
                                              int group, Stage& stage) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const u32 full = shared + BARRIERS_AT, empty = full + 8 * STAGES;
  // Rows of the two tiles of 64; gated: of gate and, the same ones, of up.
  const int row = GATED ? warp * 8 + lane / 4 : warp * 16 + lane / 4;
  const u32 words = shared + WEIGHTS_AT + group * 2 * TILE_WORDS;
  const u32 scales = shared + WEIGHTS_AT + GROUPS * 2 * TILE_WORDS + group * 2 * TILE_SCALES;
  const Places places(a, work);
  float sum[2][SLOTS / 2];
  u32 first[16], second[16];
#pragma unroll
  for (int i = 0; i < SLOTS / 2; ++i) sum[0][i] = sum[1][i] = 0.0f;
  int before = 0;
  for (int slab = 0; slab < a.slabs; ++slab) {
    barrier_wait(full + 8 * stage.index, stage.parity);
    const u32 w = words + stage.index * WEIGHT_BYTES, s = scales + stage.index * WEIGHT_BYTES;
    Row rows[4];
    if (GATED) {
      rows[0].load(w, s, row, lane % 4);
      rows[1].load(w + TILE_WORDS, s + TILE_SCALES, row, lane % 4);
      rows[2].load(w, s, row + 32, lane % 4);
      rows[3].load(w + TILE_WORDS, s + TILE_SCALES, row + 32, lane % 4);
    } else {
      rows[0].load(w, s, row, lane % 4);
      rows[1].load(w, s, row + 8, lane % 4);
      rows[2].load(w + TILE_WORDS, s + TILE_SCALES, row, lane % 4);
      rows[3].load(w + TILE_WORDS, s + TILE_SCALES, row + 8, lane % 4);
    }
    // The same in all lanes, which the compiler cannot know.
    const int index = __shfl_sync(0xFFFFFFFF, stage.index, 0);
    const u64 tokens = describe(shared + index * TOKEN_BYTES);
    products_wait<1>();
    decode_rows(a, first, rows[0], rows[1]);
    multiply(sum[0], first, tokens);
    products_wait<1>();
    if (slab > 0 && lane == 0) barrier_arrive(empty + 8 * before);
    decode_rows(a, second, rows[2], rows[3]);
    multiply(sum[1], second, tokens);
    before = stage.index;
    stage.next();
  }
  products_wait<0>();
  if (lane == 0) barrier_arrive(empty + 8 * before);
  store(a, work, places, shared, group, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 shared = shared_address(memory);
  const u32 full = shared + BARRIERS_AT, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 128 + 1);
      barrier_init(empty + 8 * i, GROUPS * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int blocks = (a.rows + GROUPS * GROUP_ROWS - 1) / (GROUPS * GROUP_ROWS);
  const int items = __ldg(a.num_tiles) * blocks;
  const int group = threadIdx.x / 128;
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
    load_all(a, shared, blocks, items);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(PRODUCT_REGISTERS));
    Stage stage;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Work work(a, item, blocks);
      if (row_tile(a, work.block, group, 0) < 0) {
        // No rows for this group: it only lets the stages go.
        for (int slab = 0; slab < a.slabs; ++slab) {
          barrier_wait(full + 8 * stage.index, stage.parity);
          if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * stage.index);
          stage.next();
        }
        continue;
      }
      multiply_item(a, work, shared, group, stage);
    }
  }
}
