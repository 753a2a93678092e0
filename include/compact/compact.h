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

#ifdef __cplusplus
}
#endif

#endif /* COMPACT_COMPACT_H_ */
