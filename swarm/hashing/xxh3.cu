// XXH3-128 of many inputs at once; the long form of https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
//
//     input | block 0: 1024 bytes | block 1 | ... | up to 1023 bytes | the last 64 bytes |
//             16 stripes of 8 lanes                 whole stripes      once more, with another part of the secret
//             added to 8 accumulators, then scrambled
//
// Every input is longer than 240 bytes, where the long form begins. Four threads hash one input, each two neighbouring
// lanes: a thread loads 16 bytes of a stripe, and the accumulators of different threads meet only in the final sums.
// An input may start and end at any address. An aligned word that holds no byte of the input is never read, because
// memory may end there.
//
// `python -m swarm.hashing.kernels` compiles this file to xxh3.fatbin. What stands before the kernels is plain C++: the
// unit tests compile it for the CPU.

#ifdef __CUDACC__
#define FN __device__ __forceinline__
#define TABLE __constant__ const
#define UMULHI(a, b) __umul64hi(a, b)
#else
#define FN static inline
#define TABLE static const
#define UMULHI(a, b) ((u64)(((unsigned __int128)(a) * (b)) >> 64))
#endif

typedef unsigned long long u64;
typedef long long i64;

// XXH3's secret of 192 bytes as little-endian words, and 8 words from each of three byte offsets that are no multiples
// of 8: 121 for the last stripe, 11 and 117 for the low and the high half of the digest.
TABLE u64 SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb,
    0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088,
    0x4ef90da297486471, 0xd8acdea946ef1938, 0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a,
    0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
TABLE u64 LAST[8] = {
    0xea647378d9c97e9f, 0xc5c3ebd33483acc5, 0x17eb6313faffa081, 0xd349daf0b751dd0d,
    0x2b9e68d429265516, 0x8ffca1477d58be16, 0x45ce31d07ad1b8f8, 0xaf280416958f3acb,
};
TABLE u64 LOW[8] = {
    0x6dd4de1cad21f72c, 0xa44072db979083e9, 0xe679cb1f67b3b7a4, 0xd05a8278e5c0cc4e,
    0x4608b82172ffcc7d, 0x9035e08e2443f774, 0x52283c4c263a81e6, 0x65d088cb00c391bb,
};
TABLE u64 HIGH[8] = {
    0xd9c97e9fc83159b4, 0x3483acc5ea647378, 0xfaffa081c5c3ebd3, 0xb751dd0d17eb6313,
    0x29265516d349daf0, 0x7d58be162b9e68d4, 0x7ad1b8f88ffca147, 0x958f3acb45ce31d0,
};
TABLE u64 INITIAL[8] = {
    0xc2b2ae3d, 0x9e3779b185ebca87, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9,
    0x85ebca77c2b2ae63, 0x85ebca77, 0x27d4eb2f165667c5, 0x9e3779b1,
};
#define PRIME32_1 0x9e3779b1ull
#define PRIME64_1 0x9e3779b185ebca87ull
#define PRIME64_2 0xc2b2ae3d27d4eb4full
#define PRIME_MX 0x165667919e3779f9ull

#define BLOCK_BYTES 1024
#define STRIPE_BYTES 64
#define STRIPES 16  // of a block

struct Pair {
    u64 even, odd;
};

// The two words at an address. Where it is no multiple of 8, each is put together from the two words that it lies in.
template <bool ALIGNED> FN Pair load(const unsigned char* at) {
#ifdef __CUDACC__
    if (ALIGNED) {
        ulonglong2 both = __ldcs((const ulonglong2*)at);  // read once: it need not stay in a cache
        return {both.x, both.y};
    }
#endif
    const u64* words = (const u64*)((u64)at & ~7ull);
    unsigned shift = ((u64)at & 7) * 8;
    u64 first = words[0], second = words[1];
    if (!shift) return {first, second};
    u64 third = words[2];
    return {first >> shift | second << (64 - shift), second >> shift | third << (64 - shift)};
}

FN u64 product(u64 keyed) { return (keyed & 0xffffffff) * (keyed >> 32); }

// A pair of lanes takes its two words of a stripe: each word goes to its neighbour's accumulator, too.
FN void accumulate(Pair& sums, Pair data, u64 even_key, u64 odd_key) {
    sums.even += data.odd + product(data.even ^ even_key);
    sums.odd += data.even + product(data.odd ^ odd_key);
}

FN u64 scrambled(u64 sum, u64 key) { return (sum ^ sum >> 47 ^ key) * PRIME32_1; }

// The accumulators of lanes 2 * pair and 2 * pair + 1 after the whole input.
template <bool ALIGNED> FN Pair accumulated(const unsigned char* input, u64 size, int pair) {
    const unsigned char* at = input + pair * 16;
    u64 keys[STRIPES + 1];  // of stripe n: keys[n] and keys[n + 1]
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int n = 0; n <= STRIPES; n++) keys[n] = SECRET[n + 2 * pair];
    u64 scramble_even = SECRET[16 + 2 * pair], scramble_odd = SECRET[17 + 2 * pair];
    Pair sums = {INITIAL[2 * pair], INITIAL[2 * pair + 1]};
    u64 blocks = (size - 1) / BLOCK_BYTES;
    for (u64 block = 0; block < blocks; block++, at += BLOCK_BYTES) {
        Pair data[STRIPES];
#ifdef __CUDACC__
#pragma unroll
#endif
        for (int n = 0; n < STRIPES; n++) data[n] = load<ALIGNED>(at + n * STRIPE_BYTES);
#ifdef __CUDACC__
#pragma unroll
#endif
        for (int n = 0; n < STRIPES; n++) accumulate(sums, data[n], keys[n], keys[n + 1]);
        sums = {scrambled(sums.even, scramble_even), scrambled(sums.odd, scramble_odd)};
    }
    int stripes = (int)((size - 1 - blocks * BLOCK_BYTES) / STRIPE_BYTES);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int n = 0; n < STRIPES - 1; n++)
        if (n < stripes) accumulate(sums, load<ALIGNED>(at + n * STRIPE_BYTES), keys[n], keys[n + 1]);
    accumulate(sums, load<ALIGNED>(input + size - STRIPE_BYTES + pair * 16), LAST[2 * pair], LAST[2 * pair + 1]);
    return sums;
}

// The 128-bit product of the two words, folded into 64 bits.
FN u64 folded(u64 left, u64 right) { return left * right ^ UMULHI(left, right); }

// What a pair of lanes adds to the low half of the digest (`even`) and to its high half (`odd`).
FN Pair merged(Pair sums, int pair) {
    return {folded(sums.even ^ LOW[2 * pair], sums.odd ^ LOW[2 * pair + 1]),
            folded(sums.even ^ HIGH[2 * pair], sums.odd ^ HIGH[2 * pair + 1])};
}

FN u64 avalanched(u64 total) {
    total = (total ^ total >> 37) * PRIME_MX;
    return total ^ total >> 32;
}

FN u64 big_endian(u64 value) {
    value = (value & 0x00ff00ff00ff00ffull) << 8 | (value >> 8 & 0x00ff00ff00ff00ffull);
    value = (value & 0x0000ffff0000ffffull) << 16 | (value >> 16 & 0x0000ffff0000ffffull);
    return value << 32 | value >> 32;
}

// The 16 bytes of the digest, from the sums of what all pairs add.
FN Pair finished(Pair totals, u64 size) {
    return {big_endian(avalanched(totals.odd + ~(size * PRIME64_2))),
            big_endian(avalanched(totals.even + size * PRIME64_1))};
}

#ifdef __CUDACC__
#define THREADS 128  // of a block: 32 inputs

// Inputs that follow one another: `count` of `size` bytes each from `address` on; `before` of all come before them.
struct Run {
    i64 address, size, count, before;
};

// The digests of `count` inputs, 16 bytes each, to `digests`: device memory, or pinned memory of the host.
template <bool ALIGNED> FN void digest(const Run* runs, int run_count, ulonglong2* digests, i64 count) {
    i64 thread = (i64)blockIdx.x * THREADS + threadIdx.x;
    i64 row = thread / 4;
    int pair = (int)(thread % 4);
    bool mine = row < count;
    if (!mine) row = count - 1;  // all threads of a warp take part in its sums
    int first = 0, beyond = run_count;
    while (beyond - first > 1) {
        int middle = (first + beyond) / 2;
        if (runs[middle].before > row) beyond = middle;
        else first = middle;
    }
    Run run = runs[first];
    const unsigned char* input = (const unsigned char*)(run.address + (row - run.before) * run.size);
    Pair totals = merged(accumulated<ALIGNED>(input, (u64)run.size, pair), pair);
    __syncwarp();
    for (int step = 1; step < 4; step *= 2) {
        totals.even += __shfl_xor_sync(0xffffffff, totals.even, step);
        totals.odd += __shfl_xor_sync(0xffffffff, totals.odd, step);
    }
    if (mine && pair == 0) {
        Pair bytes = finished(totals, (u64)run.size);
        digests[row] = make_ulonglong2(bytes.even, bytes.odd);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
xxh3_128_aligned(const Run* runs, int run_count, ulonglong2* digests, i64 count) {
    digest<true>(runs, run_count, digests, count);  // all addresses and sizes are multiples of 16
}

extern "C" __global__ void __launch_bounds__(THREADS)
xxh3_128(const Run* runs, int run_count, ulonglong2* digests, i64 count) {
    digest<false>(runs, run_count, digests, count);
}

struct Piece {
    i64 target, source, size;
};

// Copies bytes: a thread block for each piece. It runs where the hashes run, so that both stay in order.
extern "C" __global__ void __launch_bounds__(THREADS) gather(const Piece* pieces) {
    Piece piece = pieces[blockIdx.x];
    i64 done = 0;
    if (!((piece.target | piece.source) & 15)) {
        for (i64 at = threadIdx.x; at < piece.size / 16; at += THREADS)
            ((ulonglong2*)piece.target)[at] = ((const ulonglong2*)piece.source)[at];
        done = piece.size & ~15ll;
    }
    for (i64 at = done + threadIdx.x; at < piece.size; at += THREADS)
        ((unsigned char*)piece.target)[at] = ((const unsigned char*)piece.source)[at];
}
#endif
