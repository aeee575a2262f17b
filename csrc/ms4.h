/* ms4.h -- the engine's whole public C API.  Python reads the part between the cffi marks.
 *
 * Objects:  ms4_engine is one loaded model: weights, expert store, worker threads.
 *           ms4_session is one line of tokens: its kv cache (latents) and its length.
 *           A step computes tokens of one or more sessions together.
 * Errors:   functions that can fail return MS4_OK or a negative ms4_status; ms4_error() says why.
 *           After a failure the object is as it was before the call.
 * Memory:   _open gives, _close takes; _close(NULL) does nothing.  The engine copies what it keeps of
 *           the caller's data.  Nothing is ever freed on the other side of this line.
 * Threads:  an engine may serve many threads, a session one at a time.  Steps take turns inside, in the
 *           order in which they were asked for, and nothing else waits for them.  ms4_session_progress,
 *           ms4_vision_progress and ms4_engine_stats may be called at any time; so may a stop flag be
 *           raised.  Not usable after fork().
 * Stopping: a stop flag is the caller's, an int32_t that is 0 until somebody sets it to another value, once.
 *           Whoever was given it gives up soon and answers MS4_ECANCELED, also if it was set before.
 */
#ifndef MS4_H
#define MS4_H
#include <stddef.h>
#include <stdint.h>
/* cffi:begin */
typedef struct ms4_engine ms4_engine;
typedef struct ms4_session ms4_session;

typedef enum {
    MS4_OK = 0,
    MS4_EARG = -1,       /* the caller's mistake: a bad argument or a wrong order of calls */
    MS4_EIO = -2,        /* the model file could not be read, or changed while in use */
    MS4_EMODEL = -3,     /* the tensor table does not describe a model this engine runs */
    MS4_ENOMEM = -4,     /* not enough memory */
    MS4_EFULL = -6,      /* the session's context is full */
    MS4_ECANCELED = -7,  /* the stop flag was raised */
    MS4_ENUMBER = -8,    /* the model gave a number that is not finite */
    MS4_EDEVICE = -9     /* there is no GPU that can be used, or it failed */
} ms4_status;

/* --- this process ------------------------------------------------------------------------- */
const char *ms4_error(void);                      /* text of this thread's last failure */

typedef struct {
    const char *isa;             /* kernel table in use: "avx512", "avxvnni", "avx2", "neon" or "ref" */
    int32_t n_threads;           /* default number of threads: affinity and cgroup quota allow so many */
} ms4_machine;
int ms4_probe(ms4_machine *out);

typedef struct {                 /* the first GPU, as its driver describes it */
    char name[128], bus[32];     /* bus: its address, as in /sys/bus/pci/devices */
    int32_t driver;              /* CUDA version of the driver: 1000 * major + 10 * minor */
    int32_t major, minor;        /* compute capability */
    int32_t n_multiprocessors;
    uint64_t total, free;        /* bytes of its memory */
} ms4_gpu;
int ms4_gpu_probe(ms4_gpu *out);                  /* MS4_EDEVICE: ms4_error() says why there is none */

#define MS4_FILE_NAME 512
typedef struct {                 /* what the system lets this process have; a name is empty where there is no limit */
    int32_t n_threads;           /* by all limits, rounded down, at least 1 */
    int32_t n_affinity;          /* processors that it may run on */
    double cpus;                 /* processors at a time, by the tightest quota or set of a cgroup, and its file */
    char cpus_file[MS4_FILE_NAME];
    uint64_t total, available;   /* bytes of memory of the machine; the pages of files count as available */
    uint64_t limit, used;        /* of the cgroup with the least room, and its file; used: without the pages of files */
    char limit_file[MS4_FILE_NAME];
    uint64_t room;               /* bytes that it may still take; 0 if nobody says */
} ms4_allowance;
/* Reads it anew, in /proc and /sys below the folder root: "", but in tests. */
void ms4_allowed(const char *root, ms4_allowance *out);

/* --- the model ---------------------------------------------------------------------------- */
typedef struct {                 /* hyperparameters; names and meaning as in SPEC 1.2, 1.3 and 4.3 */
    int32_t n_layer, n_dense_layer, n_vocab, n_ctx_train;
    int32_t d_model, d_dense, d_expert, d_shared;
    int32_t n_head, d_nope, d_rope, d_value, q_rank, kv_rank;
    int32_t n_expert, n_expert_used;
    float norm_eps, router_scale;
    int32_t router_norm;         /* 1: weights of the chosen experts are divided by their sum */
    double attn_scale;           /* multiplies q . k */
    double temp_beta;            /* query temperature: 1 + temp_beta * ln(1 + floor(pos / temp_length)) */
    int32_t temp_length;
    double rope_freq[128];       /* inverse frequencies of the d_rope / 2 pairs, YaRN applied */
} ms4_shape;

typedef enum {                   /* what a tensor is for; comments give the GGUF names */
    MS4_TOKEN_EMBD,              /* token_embd */
    MS4_OUTPUT_NORM,             /* output_norm */
    MS4_OUTPUT,                  /* output (or token_embd once more, if tied) */
    MS4_ATTN_NORM,               /* blk.N.attn_norm, and so on */
    MS4_ATTN_Q_A, MS4_ATTN_Q_A_NORM, MS4_ATTN_Q_B,
    MS4_ATTN_KV_A_MQA, MS4_ATTN_KV_A_NORM,
    MS4_ATTN_K_B, MS4_ATTN_V_B,  /* k_b: n_head x kv_rank rows of d_nope; v_b: n_head x d_value rows of kv_rank */
    MS4_ATTN_KV_B,               /* instead of both: n_head x (d_nope + d_value) rows of kv_rank */
    MS4_ATTN_OUTPUT,
    MS4_FFN_NORM,
    MS4_FFN_GATE, MS4_FFN_UP, MS4_FFN_DOWN,                     /* dense layers */
    MS4_FFN_GATE_INP,                                           /* router */
    MS4_FFN_GATE_EXPS, MS4_FFN_UP_EXPS, MS4_FFN_DOWN_EXPS,
    MS4_FFN_GATE_UP_EXPS,                                       /* instead of gate and up: gate rows, then up rows */
    MS4_FFN_GATE_SHEXP, MS4_FFN_UP_SHEXP, MS4_FFN_DOWN_SHEXP,
    MS4_N_ROLES
} ms4_role;

typedef struct {                 /* one tensor of the file */
    int32_t role;                /* ms4_role */
    int32_t layer;               /* -1: not in a layer */
    int32_t type;                /* GGUF type id */
    int32_t file;                /* index into paths */
    uint64_t offset, bytes;      /* in that file */
    int64_t dims[3];             /* columns, rows, experts or heads (1 where there are none) */
    const float *scales;         /* NVFP4: dims[2] multipliers of the results, or NULL */
} ms4_tensor;

typedef enum { MS4_LOAD_AUTO, MS4_LOAD_MAP, MS4_LOAD_COPY, MS4_LOAD_STREAM } ms4_load;

/* What decides how weights are loaded where nobody says it.  In bytes. */
typedef struct {
    uint64_t weights, streamed;  /* of all; of those that may stay on the disk */
    uint64_t besides;            /* that will be needed beside weights: kv caches, buffers */
    uint64_t room, available;    /* for this process, 0: nobody knows; of the machine, whatever limits this one has */
    uint64_t reserve;            /* of the room, for others */
    double cached;               /* the share of the files that lies in the page cache */
    int32_t limited;             /* room is what the user allows */
} ms4_need;
int32_t ms4_choose_load(const ms4_need *need);    /* MS4_LOAD_MAP, _COPY or _STREAM */

typedef enum { MS4_DEVICE_CPU, MS4_DEVICE_AUTO, MS4_DEVICE_CUDA, MS4_DEVICE_CUDA_SAFE } ms4_device;

typedef struct {
    int32_t n_threads;           /* 0: as ms4_probe says */
    int32_t load;                /* ms4_load: use the file's pages, copy them, or leave experts on the disk */
    int32_t n_batch;             /* most tokens computed together in prefill; 0: 2048 */
    uint64_t ram;                /* bytes of memory for this process, all in all; 0: what is free, less a reserve */
    int32_t device;              /* ms4_device; AUTO: a GPU if one can do it; SAFE: each call of it is waited for */
    uint64_t vram;               /* bytes of the GPU's memory to use; 0: what is free, less a reserve */
    int32_t patience;            /* seconds to wait for a GPU that does not answer, before it is given up; 0: 120 */
    int32_t unpinned;            /* 1: memory for copies to the GPU is not pinned, as where the system refuses it */
    const char *code;            /* the GPU's kernels: a file, or the folder of the package; NULL: there are none */
    /* called during a copy, from the opening thread; a non-zero answer ends the opening with MS4_ECANCELED */
    int (*progress)(uint64_t done, uint64_t total, void *user);
    void *user;
} ms4_options;

int ms4_engine_open(const ms4_shape *shape, const ms4_tensor *tensors, size_t n_tensors,
                    const char *const *paths, size_t n_paths, const ms4_options *options, ms4_engine **out);
void ms4_engine_close(ms4_engine *engine);

typedef struct {
    uint64_t tokens_prefill, tokens_decode, ns_prefill, ns_decode;   /* a span of one token is a decode */
    uint64_t bytes_prefill, bytes_decode;   /* of the weights that these steps needed, each once a step */
    uint64_t n_steps;
    uint64_t experts_used;       /* (token, expert) pairs computed */
    uint64_t bytes_weights;      /* bytes of the tensors in the table */
    uint64_t kv_blocks, kv_bytes;           /* of all sessions' kv caches; what several share counts once */
    /* Of experts that stay on the disk; 0 if none do.  Wanted by the layers of steps; there without being read for it,
     * or just ahead of it; read. */
    uint64_t experts_wanted, experts_there, experts_read;
    uint64_t bytes_disk, ns_disk;           /* read of experts, and while at least one read was under way */
    uint64_t ns_waited, ns_waiting;         /* that steps waited for the disk; that the running one waits now */
    uint64_t slots, slot_bytes;             /* experts that are in memory now, and their bytes */
    uint64_t slot_bytes_most, ram;          /* bytes that they may have, and the process all in all */
    int32_t direct;                         /* 1: the disk is read past the page cache */
    int32_t n_threads, n_batch, load;       /* as chosen */
    const char *isa;
    const char *device;          /* "cpu" or "cuda": who computes all but the experts that it has no room for */
    const char *note;            /* what is not as it might be, and why; empty: nothing */
    uint64_t vram_bytes;         /* of the GPU's memory, taken */
    uint64_t experts;            /* of the model, where there is a GPU */
    uint64_t vram_slots, vram_experts;      /* places for experts there; those that hold one */
    uint64_t pairs_on_gpu;       /* of experts_used */
    uint64_t uploads, bytes_uploaded;       /* experts brought to the GPU since opening, to stay there for a while */
    uint64_t bytes_streamed;     /* of experts brought for one layer of a prompt */
    uint64_t pinned_bytes, unpinned_bytes;  /* of host memory for copies to it; that the system would not pin */
    uint64_t bytes_on_gpu;       /* of bytes_prefill and bytes_decode, what the GPU read in its own memory */
    uint64_t bytes_fetched;      /* copied from it to host memory: logits, choices, rows for other experts, caches */
    uint64_t evictions;          /* experts that lost their place there to another */
    uint64_t downloads, bytes_downloaded;   /* of them, those that came down into RAM, where that is short */
    uint64_t uploads_failed, slots_given_up;     /* not brought for want of something; places, for want of memory */
    uint64_t bytes_allowed;      /* that might be brought beside the running step, or the last one */
    double bus_bytes_per_s;      /* as uploads have gone so far; 0: none has */
    int32_t stream_from;         /* rows of a step from which an expert without a place is brought for its layer */
} ms4_stats;
void ms4_engine_stats(ms4_engine *engine, ms4_stats *out);

/* After a failure of the GPU, or for want of its memory: all is computed by the CPU from now on, ms4_stats.note says
 * so, with why, and nothing is asked of a GPU that failed.  The sessions have been rewound to 0 before, as the kv cache
 * was there: MS4_EARG if one has not. */
int ms4_engine_leave_gpu(ms4_engine *engine, const char *why);

/* What has been used of experts that stay on the disk, to begin with it the next time: the number of bytes, and the
 * bytes, if there is room for them.  0: none stay there.  The caller owns the file's name and atomicity. */
size_t ms4_engine_uses(ms4_engine *engine, uint8_t *out, size_t room);
/* The reverse: reads, in the background, what was used most.  MS4_EMODEL: these are not the uses of this model. */
int ms4_engine_warm(ms4_engine *engine, const uint8_t *uses, size_t n);

/* Who is told what the router chose, from the thread of the step, which waits for it: after each layer that has
 * experts, n_tokens x n_expert_used ids, those of a token ascending; and with layer -1 once the step has ended well, so
 * that what was said of it counts.  It calls no function of the engine.  NULL: nobody, and then it costs nothing. */
void ms4_engine_watch(ms4_engine *engine, void (*routed)(int32_t layer, int32_t n_tokens, const int32_t *experts,
                                                         void *user), void *user);

/* The limits of this machine for this engine and its threads, as they are now: bytes per second, reading the first
 * `most` bytes of its weights once in order (caches hold less than a large model, so nothing else would do; fewer bytes
 * are read up to five times), and multiply-adds per second of the kernel table's ISA in registers, 8-bit and float.  On
 * a shared machine they change by the second: measure close to what is compared with them. */
typedef struct {
    double read_bytes_per_s, int8_macs_per_s, float_macs_per_s;
    double vram_bytes_per_s, bus_bytes_per_s;    /* of a GPU: its memory, read and written by copies; host to card */
} ms4_limits;                                    /* 0: there is none */
int ms4_measure(ms4_engine *engine, uint64_t most, ms4_limits *out);

/* --- a line of tokens --------------------------------------------------------------------- */
int ms4_session_open(ms4_engine *engine, int32_t n_ctx, ms4_session **out);
void ms4_session_close(ms4_session *session);
int32_t ms4_session_length(const ms4_session *session);
int ms4_session_rewind(ms4_session *session, int32_t length);    /* forget everything after */
/* The session forgets what it holds and becomes the first `length` positions of another, without a copy of them. */
int ms4_session_share(ms4_session *session, const ms4_session *from, int32_t length);
/* What the session holds, to a file descriptor at its place; and back, into a session that forgets what it held.  The
 * caller owns name, header and atomicity.  load: MS4_EMODEL if these bytes are not what save wrote with this model. */
int ms4_session_save(const ms4_session *session, int fd);
int ms4_session_load(ms4_session *session, int fd);
void ms4_session_progress(const ms4_session *session, uint64_t *done, uint64_t *total);   /* layer-tokens of its step */

/* n >= 1 positions to be appended to a session.  tokens[i] >= 0 is a token; MS4_ROW takes the next row of `rows`
 * (d_model floats each: image features). */
typedef struct {
    ms4_session *session;
    const int32_t *tokens;
    size_t n;
    const float *rows;
    size_t n_rows;
    float *logits;               /* room for n_logits x n_vocab floats: those after the last n_logits positions */
    size_t n_logits;             /* 0 to n */
    int32_t n_highest, n_among;  /* 0: all of them; else only the n_highest highest of the first n_among of a row */
    int32_t *ids;                /* and room for n_logits x n_highest ids: ascending; of equal logits the first */
    const int32_t *stop;         /* or NULL */
    int32_t status;              /* out: MS4_OK, or why the session is as it was before */
} ms4_span;
/* Computes spans of different sessions together, at most n_batch tokens in all (ms4_stats).  Answers MS4_OK if all were
 * appended, else the first other status of a span.  Only MS4_ECANCELED and MS4_ENUMBER concern a span alone: after any
 * other failure nothing has been appended.  What a span gets does not depend on the others, to the last bit. */
int ms4_step(ms4_engine *engine, ms4_span *spans, size_t n_spans);
void ms4_stop(int32_t *stop);                                    /* raises a flag, from any thread */

/* --- images ------------------------------------------------------------------------------- */
typedef struct ms4_vision ms4_vision;            /* a vision tower with its projector (SPEC 3); belongs to an engine */

typedef struct {
    int32_t n_layer, d_model, d_ffn, n_head, patch_size, merge, d_out;
    int32_t gelu;                /* activation of the tower: 1 GELU, 0 SiLU */
    float eps, rope_theta;
} ms4_vision_shape;

typedef enum {
    MS4_V_PATCH_EMBD, MS4_V_PRE_LN,
    MS4_V_LN1, MS4_V_LN2, MS4_V_ATTN_Q, MS4_V_ATTN_K, MS4_V_ATTN_V, MS4_V_ATTN_OUT,
    MS4_V_FFN_GATE, MS4_V_FFN_UP, MS4_V_FFN_DOWN,
    MS4_MM_INPUT_NORM, MS4_MM_PATCH_MERGER,                     /* only with merge > 1 */
    MS4_MM_1, MS4_MM_1_BIAS, MS4_MM_2, MS4_MM_2_BIAS,           /* biases are optional */
    MS4_N_VISION_ROLES
} ms4_vision_role;

/* tensors: as for an engine, with ms4_vision_role.  The vision object uses the engine's threads, and takes turns with
 * steps after every layer; close it before the engine. */
int ms4_vision_open(ms4_engine *engine, const ms4_vision_shape *shape, const ms4_tensor *tensors, size_t n_tensors,
                    const char *path, ms4_vision **out);
void ms4_vision_close(ms4_vision *vision);
/* pixels: 3 x height x width floats, normalised; both sides multiples of patch_size * merge.
 * features: (height / side) x (width / side) rows of d_out floats in raster order, side = patch_size * merge. */
int ms4_vision_encode(ms4_vision *vision, const float *pixels, int32_t width, int32_t height, float *features,
                      const int32_t *stop);
int32_t ms4_vision_on_gpu(const ms4_vision *vision);     /* 0: the CPU computes it; a GPU, if any, has no room for it */
void ms4_vision_progress(const ms4_vision *vision, uint64_t *done, uint64_t *total);   /* layers; from any thread */

/* --- choosing tokens ---------------------------------------------------------------------- */
/* From so many of the highest logits, and their ids, it follows what greedy choice and top-k choose from all: with
 * n_vocab = top_k they are a row of their own.  More than so many a span may not ask for. */
#define MS4_MOST_HIGHEST 256
typedef struct {                 /* each on what the one before left, in this order */
    double temperature;          /* 0: the highest logit, of equal ones the first; nothing else counts then */
    int32_t top_k;               /* the so many highest; 0: all */
    double top_p;                /* the smallest set of the highest that weighs so much of all; 1: all */
    double min_p;                /* what weighs at least this, relative to the best; 0: all */
} ms4_sampling;
/* Chooses a token for each of n_rows rows of n_vocab logits; row i takes uniforms[i], a random number in [0, 1) (NULL
 * if the temperature is 0).  The same numbers give the same ids on every machine.  logprobs: NULL, or for each row that
 * of its id and those of the n_top highest logits, highest first, whose ids are its row of top_ids: natural logarithms
 * of the model's own probabilities, before temperature and cuts.  MS4_ENUMBER: a logit is not finite.  Needs no engine;
 * may be called from any thread. */
int ms4_sample(const float *logits, size_t n_rows, int32_t n_vocab, const ms4_sampling *how, const double *uniforms,
               int32_t *ids, int32_t n_top, int32_t *top_ids, double *logprobs);

/* --- for the tests ------------------------------------------------------------------------ */
/* Which experts a second CPU device computes: n_layer x n_expert numbers, 0 or 1; NULL: none. */
int ms4_engine_place(ms4_engine *engine, const uint8_t *place);
/* Bytes of memory for experts that stay on the disk, whatever else is used; 0: as many as fit, as before. */
int ms4_engine_slots(ms4_engine *engine, uint64_t bytes);
/* Bytes per second of the bus to the GPU, and rows from which experts are brought for a layer, in place of what is
 * measured; 0: as measured. */
int ms4_engine_rates(ms4_engine *engine, double bus, int32_t stream_from);
struct ms4_ops;
const struct ms4_ops *ms4_ops_for(const char *isa);              /* NULL: this machine cannot run it */
/* cffi:end */
#define MS4_ROW (-1)
#endif
