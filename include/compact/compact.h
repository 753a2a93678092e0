/* The C interface: plain C99, the promise that bindings build on.
 *
 * Every struct begins with struct_size, which the caller sets to sizeof of the struct it was compiled with; later
 * versions of CA_ABI_VERSION 1 add members at the end only, and zero means what it meant without them. A struct that is
 * newer than the library is refused. Strides are in elements. Functions return a status; ca_last_error() has the
 * sentence to it. No function prints, aborts or throws.
 */
#ifndef COMPACT_COMPACT_H_
#define COMPACT_COMPACT_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CA_ABI_VERSION 1

/* ---- status ---- */

typedef int32_t ca_status;
enum {
  CA_OK = 0,
  CA_INVALID_ARGUMENT = 1, /* the caller's input is wrong; the message says what is allowed */
  CA_UNSUPPORTED = 2,      /* valid input that this build or backend does not implement */
  CA_OUT_OF_MEMORY = 3,
  CA_IO_ERROR = 4,
  CA_INTERNAL = 5,  /* an invariant of the library is broken */
  CA_CUDA_ERROR = 6 /* the CUDA runtime or driver failed; the message is its text */
};

/* What failed last on this thread, the value seen, what is allowed; "" after success. Valid until the next call of any
 * other function on this thread. */
const char* ca_last_error(void);

/* ---- version and machine ---- */

uint32_t ca_abi_version(void);   /* CA_ABI_VERSION of the library; must equal the caller's */
const char* ca_version(void);    /* "major.minor.patch" of the library */
const char* ca_cpu_target(void); /* instruction set that the CPU backend uses, e.g. "AVX2" */

enum { CA_CUDA_BACKEND_AUTO = 0, CA_CUDA_BACKEND_SM90 = 1, CA_CUDA_BACKEND_SM80 = 2 };

typedef struct ca_cuda_device {
  uint32_t struct_size;
  int32_t capability; /* out: 10 * major + minor */
  int32_t num_sms;    /* out */
  int32_t backend;    /* out: what CA_CUDA_BACKEND_AUTO means on it */
} ca_cuda_device;

/* The thread's current device. CA_UNSUPPORTED: the library was built without CUDA, or the device is too old. */
ca_status ca_cuda_device_query(ca_cuda_device* device);

/* ---- attention over page lists ---- */

/* Element types. CPU: q and o are f32, k and v f32 or bf16. CUDA: all four have the type of k, bf16 or f16. */
enum { CA_DTYPE_F32 = 0, CA_DTYPE_BF16 = 1, CA_DTYPE_F16 = 2 };

/* A unit with its page list. List coordinate c = index of a token in the concatenation of the listed pages; query i of
 * the unit sees c iff c < list_tokens and (c < past_tokens or c - past_tokens <= causal_shift + i). Arrays of it lie in
 * host or device memory: 32 bytes, fixed. */
typedef struct ca_attention_unit {
  int32_t q_begin; /* first token row of the unit in q and o */
  int32_t q_len;   /* tokens; 0 is allowed */
  int32_t q_head;  /* first query head */
  int32_t kv_head;
  int32_t list_begin;   /* first entry in page_ids; units may share a list */
  int32_t list_tokens;  /* tokens of the list: past + chunk; 0: o = 0, lse = -inf */
  int32_t past_tokens;  /* tokens of the list before the chunk, seen by every query of the unit */
  int32_t causal_shift; /* chunk position of the unit's first query */
} ca_attention_unit;

/* T tokens, Hq query heads, Hkv KV heads, D head dimension, P tokens per page. Units must not share rows of o. A list
 * names its pages in ascending logical order, the pages of the chunk complete, in order and last. All pointers are host
 * pointers for ca_attention_run_cpu and device pointers for ca_attention_run_cuda. */
typedef struct ca_attention {
  uint32_t struct_size;
  int32_t kv_dtype;
  const void* q;          /* [T, Hq, D] after RoPE */
  int64_t q_token_stride; /* >= D; CUDA: a multiple of 8, as all strides */
  int64_t q_head_stride;
  void* o; /* [T, Hq, D]; rows of no unit are left alone */
  int64_t o_token_stride;
  int64_t o_head_stride;
  float* lse;    /* [T, Hq] or NULL; natural log; -inf for a row that sees nothing */
  const void* k; /* pages of one layer, any layout with D contiguous: [num_pages, Hkv, P, D], [num_pages, P, Hkv, D] */
  const void* v; /* the same strides */
  int64_t kv_page_stride;
  int64_t kv_head_stride;
  int64_t kv_token_stride;
  const ca_attention_unit* units; /* [num_units] */
  const int32_t* page_ids;        /* [num_page_ids] physical pages */
  int32_t num_q_tokens;           /* T */
  int32_t num_q_heads;            /* Hq */
  int32_t num_kv_heads;           /* Hkv */
  int32_t head_dim;               /* D; CPU: a multiple of 8 up to 256; CUDA: 64, 128, 256 */
  int32_t page_tokens;            /* P; CUDA: a power of two from 16 to 256 */
  int32_t num_pages;              /* pages in the cache */
  int32_t num_units;              /* CUDA: a bound, if the number of units lies on the device */
  int32_t num_page_ids;           /* CPU: lists are checked against it; CUDA: not read, the device has the lists */
  int32_t heads_per_unit;         /* query heads of a unit; divides Hq / Hkv */
  float softmax_scale;            /* above 0 */
} ca_attention;

/* Threads of the CPU backend. num_threads 0: every hardware thread that this process may use. One call at a time. */
typedef struct ca_thread_pool ca_thread_pool;
ca_status ca_thread_pool_create(int32_t num_threads, ca_thread_pool** pool);
void ca_thread_pool_destroy(ca_thread_pool* pool); /* NULL is allowed */

ca_status ca_attention_run_cpu(const ca_attention* attention, ca_thread_pool* pool);

typedef struct ca_cuda_options {
  uint32_t struct_size;
  int32_t backend; /* CA_CUDA_BACKEND_... */
  /* 0: long lists are cut by load, bits depend on the whole batch. n: cut every n tokens whatever the load, so that the
   * bits of a request do not depend on the others; a multiple of 128, needs max_list_tokens. */
  int32_t fixed_split_tokens;
  int32_t max_list_tokens; /* longest list; used with fixed_split_tokens only */
  /* Not 0: units and page ids are checked on the device first; a mistake is reported in device_error and nothing is
   * computed. Otherwise a page id outside the cache reads as a page of zeros, a bad unit is undefined behaviour. */
  int32_t check_lists;
  int32_t reserved;         /* 0 */
  const int32_t* num_units; /* device, or NULL: ca_attention.num_units. Units in use */
  int32_t* device_error;    /* device, or NULL; never reset. First failure that only the device can see */
} ca_cuda_options;

/* Text for a value of device_error. */
const char* ca_cuda_device_error_text(int32_t device_error);

/* Bytes of device memory that ca_attention_run_cuda needs for these sizes; no pointer of `attention` is read. options
 * may be NULL: all defaults. */
ca_status ca_attention_cuda_workspace(const ca_attention* attention, const ca_cuda_options* options, int64_t* bytes);

/* Asynchronous on `stream` (a cudaStream_t; NULL is the default stream): no synchronisation, no allocation; may be
 * captured in a CUDA graph. workspace: device memory, a multiple of 256 bytes; serves the calls of one stream. */
ca_status ca_attention_run_cuda(const ca_attention* attention, const ca_cuda_options* options, void* workspace,
                                int64_t workspace_bytes, void* stream);

/* ---- the sparse step of a layer on a GPU: selection, union, page lists, attention ---- */

/* A request's part of a step. Arrays of it lie in device memory: 16 bytes, fixed. */
typedef struct ca_step_chunk {
  int32_t q_begin;      /* first row in q and o */
  int32_t chunk_tokens; /* C; 0 does nothing */
  int32_t chunk_start;  /* S: position of the first query; the context has S + C tokens */
  int32_t table_row;    /* row of page_tables */
} ca_step_chunk;

/* Which query rows share a page list: the chunk, span_tokens, 128 packed rows, or what the cost model joins of these.
 */
enum { CA_UNION_PAPER = 0, CA_UNION_SPAN = 1, CA_UNION_TILE = 2, CA_UNION_ADAPTIVE = 3 };

/* Who selects: docs/design/method.md section 3. CA_SELECTOR_STATIC selects nothing beside sink and window. */
enum {
  CA_SELECTOR_MEAN_KEY = 0,
  CA_SELECTOR_STATIC = 1,
  CA_SELECTOR_ORACLE = 2,
  CA_SELECTOR_SUB_MEAN = 3,
  CA_SELECTOR_XATTENTION = 4,
  CA_SELECTOR_QUOKA = 5,
  CA_SELECTOR_RANDOM = 6,
  CA_SELECTOR_EXTERNAL = 7 /* mask_words */
};

/* How rows of scores become rows of the mask: the selector's own rule, pages of a score, the best pages, pages of so
 * much of the row's sum, pages until the chunk's density. */
enum { CA_BUDGET_NATIVE = 0, CA_BUDGET_THRESHOLD = 1, CA_BUDGET_TOP = 2, CA_BUDGET_MASS = 3, CA_BUDGET_DENSITY = 4 };

/* Why a chunk read every page. */
enum {
  CA_DENSE_NONE = 0, /* it did not: the lists of the selection */
  CA_DENSE_SELECTOR = 1,
  CA_DENSE_FIRST_CHUNK = 2,
  CA_DENSE_SHORT_CONTEXT = 3, /* below min_context_tokens */
  CA_DENSE_HIGH_DENSITY = 4,  /* by the cost model the lists were not faster */
  CA_DENSE_REQUESTED = 5
};

/* Sums of one chunk and sub-group of heads; rows = tokens x query heads. Density is listed / visible. 24 bytes, fixed.
 */
typedef struct ca_union_stats {
  int64_t listed_row_pages;
  int64_t wanted_row_pages; /* before the union */
  int64_t visible_row_pages;
} ca_union_stats;

/* Host numbers and device pointers. The first part is the step's, the same for all its layers; the second the layer's.
 * Chunks, lengths and tables are read from the device at every run: a captured graph follows them within its bounds. */
typedef struct ca_step {
  uint32_t struct_size;
  int32_t dtype;               /* of q, o, k, v, mean_k: bf16 or f16 */
  const ca_step_chunk* chunks; /* [num_chunks] */
  const int32_t* page_tables;  /* [num_table_rows, page_table_stride] physical page of each logical page */
  const int32_t* mean_tokens;  /* [num_pages] tokens that each mean covers, or NULL: of every complete page P */
  int64_t page_table_stride;
  int32_t num_table_rows;
  int32_t num_chunks;
  int32_t num_q_tokens;       /* T */
  int32_t max_context_tokens; /* bound of every S + C */
  int32_t num_q_heads;        /* Hq */
  int32_t num_kv_heads;       /* Hkv */
  int32_t head_dim;           /* D: 64, 128, 256 */
  int32_t page_tokens;        /* P, a power of two from 16 to 256 */
  int32_t num_pages;          /* pages in the cache */
  int32_t sink_tokens;        /* always read: pages of the context's begin */
  int32_t window_tokens;      /* and pages before each query block */
  int32_t union_mode;         /* CA_UNION_... */
  int32_t heads_per_unit;     /* 0: by default */
  int32_t span_tokens;        /* of CA_UNION_SPAN */
  int32_t crosses_over;       /* not 0: all pages where the lists would not be faster */
  int32_t min_context_tokens; /* shorter contexts read all pages, without selection */
  int32_t margin_1024ths;     /* lists are used if their modelled cost times (1 + this / 1024) is below dense */

  int32_t dense;          /* not 0: this layer reads all pages */
  const void* q;          /* [T, Hq, D] after RoPE */
  int64_t q_token_stride; /* strides: multiples of 8 elements */
  int64_t q_head_stride;
  void* o; /* [T, Hq, D]; rows of no chunk are left alone */
  int64_t o_token_stride;
  int64_t o_head_stride;
  float* lse;    /* [T, Hq] or NULL */
  const void* k; /* pages of the layer */
  const void* v; /* the same strides */
  int64_t kv_page_stride;
  int64_t kv_head_stride;
  int64_t kv_token_stride;
  const void* mean_k;       /* [num_pages, Hkv, D]; not read if dense */
  ca_union_stats* stats;    /* [num_stats] or NULL */
  int32_t* dense_reasons;   /* [num_stats] CA_DENSE_..., or NULL */
  uint64_t* nonfinite_rows; /* [1] or NULL: rows of NaN or infinite scores are added; their tiles keep all pages */
  float softmax_scale;      /* above 0 */
  float share;              /* a page is wanted with this share of a row's softmax over mean keys, or */
  float lift;               /* with lift / pages, whichever is more; the same of sub-mean's scores */
  int32_t backend;          /* CA_CUDA_BACKEND_... */

  /* All 0: mean-key by its own rule. */
  int32_t selector; /* CA_SELECTOR_... */
  int32_t budget;   /* CA_BUDGET_...; not for mean-key, static and external */
  float budget_value;
  int32_t min_pages; /* of a row; 0: off */
  int32_t max_pages;
  int32_t layer;        /* of random: another layer, other pages */
  int32_t mask_heads;   /* of external: rows of the mask per query block, Hq or Hkv; 0: Hkv */
  int32_t block_tokens; /* of external: tokens of a query block; 0: 128 * Hkv / Hq, a power of two within a page */
  uint64_t seed;        /* of random */
  const float* head_thresholds; /* [mask heads] or NULL: in place of share, mass, budget_value, ... */
  const void* sub_mean_k;       /* [num_pages, Hkv, P / w, D] of sub-mean: means of w = min(32, P) tokens */
  const float* norm_k;          /* [num_pages, Hkv, P] of quoka: norms of the keys */
  const uint64_t* mask_words;   /* [mask heads, query blocks at most, words] of external; ca_step_cuda_mask_shape */
  float temperature;            /* of sub-mean; 0: 1.5 */
  float peak_weight;            /* of sub-mean */
  float mass;                   /* of xattention; 0: 0.9 */
  int32_t stride;               /* of xattention; 0: 16 */
  int32_t picked_queries;       /* of quoka; 0: 16 */
  int32_t kept_tokens;          /* of quoka; 0: 1024 */
  float random_share;           /* of random; 0: 0.1 */
  int32_t reserved;             /* 0 */
} ca_step;

/* Bytes of device memory for ca_step_plan_cuda and ca_step_run_cuda together, and entries of stats and dense_reasons
 * (num_stats may be NULL). No pointer of `step` is read. */
ca_status ca_step_cuda_workspace(const ca_step* step, int64_t* bytes, int32_t* num_stats);

/* Shape of mask_words: [mask_heads, max_blocks, words_per_row], bit j = past page j. The blocks of a chunk are the runs
 * of block_tokens positions, cut at absolute multiples, that it meets; chunks follow each other. */
ca_status ca_step_cuda_mask_shape(const ca_step* step, int32_t* mask_heads, int32_t* max_blocks, int32_t* block_tokens,
                                  int32_t* words_per_row);

/* Once per step, before its layers: places of the chunks, checks of page tables and means. device_error: [1] in device
 * memory, set to the first mistake, never reset; a chunk with a mistake does nothing. Asynchronous on `stream`. */
ca_status ca_step_plan_cuda(const ca_step* step, int32_t* device_error, void* workspace, int64_t workspace_bytes,
                            void* stream);

/* A layer, asynchronous on `stream`: no synchronisation, no allocation, no read by the host. */
ca_status ca_step_run_cuda(const ca_step* step, void* workspace, int64_t workspace_bytes, void* stream);

/* Text for a value of ca_step_plan_cuda's device_error. */
const char* ca_step_device_error_text(int32_t device_error);

#ifdef __cplusplus
}
#endif

#endif /* COMPACT_COMPACT_H_ */
