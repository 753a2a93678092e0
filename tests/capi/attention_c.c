/* The C interface from C99: two tokens over two pages, worked by hand, and what a mistake looks like. */
#include <compact/compact.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define D 8
#define P 2

static int failures = 0;

static void expect(int condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "attention_c: %s (last error: %s)\n", what, ca_last_error());
  ++failures;
}

/* One query head, one KV head, P = 2. Context: 2 past tokens in page 1, then a chunk of 2 tokens in page 0. All keys are
 * 0 but that of the last token, so weights are equal over what is visible, except for that token's logit of log 3. */
int main(void) {
  float q[2 * D] = {0}, k[2 * P * D] = {0}, v[2 * P * D] = {0}, o[2 * D], lse[2];
  const int32_t page_ids[2] = {1, 0};
  ca_attention_unit unit = {0, 2, 0, 0, 0, 4, 2, 0};
  ca_attention attention;
  ca_thread_pool* pool = NULL;
  int i;

  q[0] = 1.0f;                         /* token 0 */
  q[D] = 1.0f;                         /* token 1 */
  v[2 * D] = 1.0f;                     /* past token 0: page 1, row 0 */
  v[3 * D] = 2.0f;                     /* past token 1 */
  v[0] = 6.0f;                         /* chunk token 0: page 0, row 0 */
  k[D] = (float)log(3.0), v[D] = 9.0f; /* chunk token 1 */

  memset(&attention, 0, sizeof attention);
  attention.struct_size = sizeof attention;
  attention.kv_dtype = CA_DTYPE_F32;
  attention.q = q;
  attention.o = o;
  attention.lse = lse;
  attention.k = k;
  attention.v = v;
  attention.q_token_stride = attention.o_token_stride = D;
  attention.q_head_stride = attention.o_head_stride = D;
  attention.kv_page_stride = P * D;
  attention.kv_head_stride = P * D;
  attention.kv_token_stride = D;
  attention.units = &unit;
  attention.page_ids = page_ids;
  attention.num_q_tokens = 2;
  attention.num_q_heads = attention.num_kv_heads = attention.heads_per_unit = 1;
  attention.head_dim = D;
  attention.page_tokens = P;
  attention.num_pages = 2;
  attention.num_units = 1;
  attention.num_page_ids = 2;
  attention.softmax_scale = 1.0f;

  expect(ca_abi_version() == CA_ABI_VERSION, "header and library differ in version");
  expect(strlen(ca_version()) >= 5 && strlen(ca_cpu_target()) > 0, "version or CPU target is empty");
  expect(ca_thread_pool_create(1, &pool) == CA_OK, "thread pool");
  expect(ca_attention_run_cpu(&attention, pool) == CA_OK, "run");
  expect(strcmp(ca_last_error(), "") == 0, "an error is left after success");
  expect(fabs(o[0] - 3.0) < 1e-6, "token 0: (1 + 2 + 6) / 3");
  expect(fabs(o[D] - 6.0) < 1e-5, "token 1: (1 + 2 + 6 + 3 * 9) / 6");
  expect(fabs(lse[0] - log(3.0)) < 1e-6 && fabs(lse[1] - log(6.0)) < 1e-6, "LSE");
  for (i = 1; i < D; ++i) expect(o[i] == 0 && o[D + i] == 0, "other dimensions are 0");

  attention.heads_per_unit = 2;
  expect(ca_attention_run_cpu(&attention, pool) == CA_INVALID_ARGUMENT, "heads_per_unit 2 must be refused");
  expect(strstr(ca_last_error(), "heads_per_unit is 2") != NULL, "the message must name field and value");

  ca_thread_pool_destroy(pool);
  ca_thread_pool_destroy(NULL);
  return failures != 0;
}
