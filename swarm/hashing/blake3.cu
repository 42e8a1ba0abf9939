// BLAKE3 of many chunks at once; section 2 of https://github.com/BLAKE3-team/BLAKE3-specs/blob/master/blake3.pdf.
//
//     chunk of the artifact | 1 KiB | 1 KiB | ... | 1 KiB |  | 1 KiB | ... | up to 1 KiB |
//                               |       |             |          a value of 32 bytes each: a thread
//                                \__   /              |
//     group of 128 KiB              value ... ________value      pairs, then pairs of pairs: a thread block
//     chunk                           \________________/         the same over groups: a thread block for each chunk
//
// BLAKE3 calls a piece of 1 KiB a chunk; here it is a block, and a chunk is what a manifest lists. At every level the
// last value without a neighbour moves up as it is. This makes the same tree as the largest-power-of-two rule of the
// specification. Block n of a chunk is hashed with counter n, wherever its bytes lie.
//
// A chunk may start and end at any address. An aligned word that holds no byte of the chunk is never read, because
// memory may end there.
//
// `python -m swarm.hashing.kernels` compiles this file to blake3.fatbin. What stands before the kernels is plain C++: the
// unit tests compile it for the CPU.

#ifdef __CUDACC__
#define FN __device__ __forceinline__
#define UNROLL _Pragma("unroll")  // constant indices keep arrays in registers
#else
#define FN static inline
#define UNROLL
#endif

typedef unsigned u32;
typedef unsigned long long u64;
typedef long long i64;

#define BLOCK_BYTES 1024
#define WORDS 8     // of a value
#define PART_WORDS 16  // of 64 bytes, which a compression takes

#define CHUNK_START 1u
#define CHUNK_END 2u
#define PARENT 4u
#define ROOT 8u

#define IV0 0x6a09e667u
#define IV1 0xbb67ae85u
#define IV2 0x3c6ef372u
#define IV3 0xa54ff53au
#define IV4 0x510e527fu
#define IV5 0x9b05688cu
#define IV6 0x1f83d9abu
#define IV7 0x5be0cd19u

struct Value {
    u32 word[WORDS];
};

FN Value initial() { return {{IV0, IV1, IV2, IV3, IV4, IV5, IV6, IV7}}; }

template <int BITS> FN u32 rotated(u32 word) { return word >> BITS | word << (32 - BITS); }

FN void mix(u32& a, u32& b, u32& c, u32& d, u32 first, u32 second) {
    a = a + b + first;
    d = rotated<16>(d ^ a);
    c = c + d;
    b = rotated<12>(b ^ c);
    a = a + b + second;
    d = rotated<8>(d ^ a);
    c = c + d;
    b = rotated<7>(b ^ c);
}

// A round takes the message words in the order that its arguments name: columns first, then diagonals.
#define ROUND(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) \
    mix(v[0], v[4], v[8], v[12], in[a], in[b]);               \
    mix(v[1], v[5], v[9], v[13], in[c], in[d]);               \
    mix(v[2], v[6], v[10], v[14], in[e], in[f]);              \
    mix(v[3], v[7], v[11], v[15], in[g], in[h]);              \
    mix(v[0], v[5], v[10], v[15], in[i], in[j]);              \
    mix(v[1], v[6], v[11], v[12], in[k], in[l]);              \
    mix(v[2], v[7], v[8], v[13], in[m], in[n]);               \
    mix(v[3], v[4], v[9], v[14], in[o], in[p]);

// The compression function: 64 bytes, of which `size` count, into the value `before`.
FN Value compressed(Value before, const u32* in, u64 counter, u32 size, u32 flags) {
    const u32* w = before.word;
    u32 v[16] = {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], IV0, IV1, IV2, IV3,
                 (u32)counter, (u32)(counter >> 32), size, flags};
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1)
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6)
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4)
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7)
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)
    Value after;
    UNROLL
    for (int n = 0; n < WORDS; n++) after.word[n] = v[n] ^ v[n + 8];
    return after;
}

// The 64 bytes at an address, all of them input.
template <bool ALIGNED> FN void load(const unsigned char* at, u32* part) {
#ifdef __CUDACC__
    if (ALIGNED) {
        const uint4* quads = (const uint4*)at;
        UNROLL
        for (int n = 0; n < 4; n++) {
            uint4 quad = __ldg(quads + n);
            part[4 * n] = quad.x, part[4 * n + 1] = quad.y, part[4 * n + 2] = quad.z, part[4 * n + 3] = quad.w;
        }
        return;
    }
#endif
    const u32* words = (const u32*)((u64)at & ~3ull);
    u32 shift = ((u64)at & 3) * 8, low = words[0];
    UNROLL
    for (int n = 0; n < PART_WORDS; n++) {
        u32 high = shift || n + 1 < PART_WORDS ? words[n + 1] : 0;
        part[n] = shift ? low >> shift | high << (32 - shift) : low;
        low = high;
    }
}

// The last `size` bytes of an input, fewer than 64, and zeros behind them.
FN void load_last(const unsigned char* at, u32 size, u32* part) {
    UNROLL
    for (u32 n = 0; n < PART_WORDS; n++) {
        part[n] = 0;
        for (u32 byte = 0; byte < 4 && 4 * n + byte < size; byte++) part[n] |= (u32)at[4 * n + byte] << (8 * byte);
    }
}

// The value of block `counter` of a chunk: `size` bytes, 1 to 1024. `only`: the chunk has no other block.
template <bool ALIGNED> FN Value block_value(const unsigned char* input, u32 size, u64 counter, bool only) {
    Value value = initial();
    u32 part[PART_WORDS], flags = CHUNK_START, left = size;
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (; left > 64; left -= 64, input += 64) {
        load<ALIGNED>(input, part);
        value = compressed(value, part, counter, 64, flags);
        flags = 0;
    }
    if (left == 64) load<ALIGNED>(input, part);
    else load_last(input, left, part);
    return compressed(value, part, counter, left, flags | CHUNK_END | (only ? ROOT : 0));
}

// The value of two neighbours. `top`: it is the digest of the chunk.
FN Value parent_value(Value left, Value right, bool top) {
    u32 part[PART_WORDS];
    UNROLL
    for (int n = 0; n < WORDS; n++) part[n] = left.word[n], part[n + WORDS] = right.word[n];
    return compressed(initial(), part, 0, 64, PARENT | (top ? ROOT : 0));
}

#ifdef __CUDACC__
#define THREADS 128  // of a thread block, and blocks of a group

#define GROUPS_MAX 512  // of a chunk: 64 MiB

// Adjacent blocks of a chunk: `size` bytes from `address` on. The chunk has `total` blocks; this row begins at block
// `counter`. Chunks are counted in whole groups: `before` is the group number of the chunk times THREADS, and `counter`.
struct Row {
    i64 address, size, before, counter, total;
};

// Values of a group or a chunk: word n of value i is word[n][i], so that threads use different banks.
template <int COUNT> struct Values {
    u32 word[WORDS][COUNT];
    FN Value get(int at) const {
        Value value;
        UNROLL
        for (int n = 0; n < WORDS; n++) value.word[n] = word[n][at];
        return value;
    }
    FN void put(int at, Value value) {
        UNROLL
        for (int n = 0; n < WORDS; n++) word[n][at] = value.word[n];
    }
};

// Merges `count` neighbours into value 0. `top`: the last merge makes the digest. All threads of the block call it.
template <int COUNT> FN void merge(Values<COUNT>& values, int count, bool top) {
    __syncthreads();
    while (count > 1) {
        int after = (count + 1) / 2;
        for (int first = 0; first < after; first += THREADS) {  // writes never pass what later steps read
            int at = first + threadIdx.x;
            Value value;
            if (2 * at + 1 < count) value = parent_value(values.get(2 * at), values.get(2 * at + 1), top && count == 2);
            else if (2 * at < count) value = values.get(2 * at);
            __syncthreads();
            if (at < after) values.put(at, value);
            __syncthreads();
        }
        count = after;
    }
}

template <bool ALIGNED> FN void groups(const Row* rows, int row_count, u32* values) {
    __shared__ Values<THREADS> shared;
    i64 block = (i64)blockIdx.x * THREADS + threadIdx.x;
    int first = 0, beyond = row_count;
    while (beyond - first > 1) {
        int middle = (first + beyond) / 2;
        if (rows[middle].before > block) beyond = middle;
        else first = middle;
    }
    Row row = rows[first];
    i64 offset = (block - row.before) * BLOCK_BYTES;
    i64 counter = row.counter + block - row.before;
    if (offset < row.size) {  // other threads are beyond the end of the chunk
        u32 size = (u32)(row.size - offset < BLOCK_BYTES ? row.size - offset : BLOCK_BYTES);
        const unsigned char* input = (const unsigned char*)(row.address + offset);
        shared.put(threadIdx.x, block_value<ALIGNED>(input, size, (u64)counter, row.total == 1));
    }
    i64 count = row.total - (counter - threadIdx.x);
    merge(shared, (int)(count < THREADS ? count : THREADS), row.total <= THREADS);
    if (threadIdx.x < WORDS) values[(i64)blockIdx.x * WORDS + threadIdx.x] = shared.word[threadIdx.x][0];
}

// The value of each group, 32 bytes apiece, to `values`.
extern "C" __global__ void __launch_bounds__(THREADS)
blake3_groups_aligned(const Row* rows, int row_count, u32* values) {
    groups<true>(rows, row_count, values);  // all addresses are multiples of 16
}

extern "C" __global__ void __launch_bounds__(THREADS)
blake3_groups(const Row* rows, int row_count, u32* values) {
    groups<false>(rows, row_count, values);
}

struct Groups {
    i64 first, count;
};

// The digest of each chunk from the values of its groups, 32 bytes apiece, to `digests`: a thread block for each chunk.
extern "C" __global__ void __launch_bounds__(THREADS)
blake3_chunks(const Groups* chunks, const u32* values, u32* digests) {
    __shared__ Values<GROUPS_MAX> shared;
    Groups groups = chunks[blockIdx.x];
    for (int at = threadIdx.x; at < groups.count; at += THREADS)
        for (int n = 0; n < WORDS; n++) shared.word[n][at] = values[(groups.first + at) * WORDS + n];
    merge(shared, (int)groups.count, true);
    if (threadIdx.x < WORDS) digests[(i64)blockIdx.x * WORDS + threadIdx.x] = shared.word[threadIdx.x][0];
}
#endif
