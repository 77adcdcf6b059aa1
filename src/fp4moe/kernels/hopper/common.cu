// What loading and multiplying share: arguments, shared memory, and the instructions behind names.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct Arguments {
  const u16* tokens;
  long long token_stride;
  const int* order;
  const int* tiles;
  const int* num_tiles;
  const unsigned char* words;
  const unsigned char* scales;
  const float* global_scale;
  const float* bias;
  const float* routing_weights;
  u16* out;
  int top_k, columns, rows, slabs;
  u32 times_4, times_16, times_64;  // these numbers, which the compiler must not know
};

constexpr int PARTS = GATED ? 2 : 1;
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int GROUP_ROWS = 128 / PARTS;  // of the output
constexpr int TILE_WORDS = 64 * 4 * WORDS * 4;  // bytes of 64 rows of a slab
constexpr int TILE_SCALES = 64 * SCALE_BYTES;
constexpr int TOKEN_BYTES = SLOTS * 128;
constexpr int WEIGHT_BYTES = GROUPS * 2 * (TILE_WORDS + TILE_SCALES);
constexpr int STAGED_PITCH = GROUP_ROWS * 2 + 16;  // of a token: no two lanes at one bank
constexpr int STAGED_BYTES = SLOTS * STAGED_PITCH;
constexpr int WEIGHTS_AT = STAGES * TOKEN_BYTES;
constexpr int STAGED_AT = WEIGHTS_AT + STAGES * WEIGHT_BYTES;
constexpr int FACTORS = (SLOTS + 127) / 128 * 128;  // routing weights of an item's slots
constexpr int FACTORS_AT = STAGED_AT + GROUPS * STAGED_BYTES;
constexpr int BARRIERS_AT = FACTORS_AT + (GATE_UP ? 0 : GROUPS * 4 * FACTORS);

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return (u32)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// 16 bytes of a token, OFFSET bytes behind an address; `bytes` 0 writes zeros.
template <int OFFSET>
__device__ __forceinline__ void copy_chunk(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1 + %2], 16, %3;" ::"r"(to), "l"(from),
               "n"(OFFSET), "r"(bytes)
               : "memory");
}

// The barrier is told when this thread's copies so far have landed: their data then is in shared
// memory, where the tensor cores read it (NVIDIA's kernels with these copies do without a fence).
__device__ __forceinline__ void copies_arrive(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// 16 bytes.
__device__ __forceinline__ void copy_out(void* to, u32 from) {
  u32 v[4];
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from));
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// Of the four warps of a group.
__device__ __forceinline__ void group_barrier(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 to_bfloat16(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Store matrices of 8 x 8, transposed: a lane holds two tokens of one row of each, and names where
// one token's eight rows of one matrix go.
__device__ __forceinline__ void put(u32 at, const u32 (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

__device__ __forceinline__ void put(u32 at, u32 first, u32 second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at),
               "r"(first), "r"(second)
               : "memory");
}

// Which stage of shared memory comes next, and the parity of its barriers.
struct Stage {
  int index = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == STAGES) {
      index = 0;
      parity ^= 1;
    }
  }
};

struct Work {
  int expert, used, number, block;
  __device__ __forceinline__ Work(const Arguments& a, int item, int blocks) {
    number = item / blocks;
    // Turned from round to round: the last block of rows, often a part, is each multiprocessor's.
    block = (item + number / max(1, (int)gridDim.x / blocks)) % blocks;
    int tile = __ldg(a.tiles + number);
    expert = tile >> 10;
    used = tile & 1023;
  }
};

// The tile of 64 rows that a group's weights come from, or -1 behind the last.
__device__ __forceinline__ int row_tile(const Arguments& a, int block, int group, int which) {
  int first = (block * GROUPS + group) * GROUP_ROWS / 64;
  if (GATED) return first * 64 < a.rows ? first + which * (a.rows / 64) : -1;
  return (first + which) * 64 < a.rows ? first + which : -1;
}
