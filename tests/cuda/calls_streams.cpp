/* calls_streams.cpp -- entry points of the emulated driver: streams, events, memory operations, graphs. */
#include "driver.h"

stream *stream_of(void *handle) {
    driver_state &d = state();
    if (!handle || handle == (void *)1) return &d.zero;
    for (stream *s : d.streams) if (s == handle) return s;
    return nullptr;
}
int submit(stream *s, op &&what) {
    if (!s->capture) {
        work_add(s, std::move(what));
        return OK;
    }
    graph &g = *s->capture->into;
    g.nodes.emplace_back(new node{ std::move(what), s->captured_last });
    s->captured_last.assign(1, g.nodes.size() - 1);
    return OK;
}

/* --- streams ---------------------------------------------------------------------------------------------------- */
EXPORT int cuStreamCreateWithPriority(void **out, unsigned flags, int priority) {
    entry e("cuStreamCreateWithPriority", true, true);
    if (e.error) return e.error;
    stream *s = new stream();
    s->blocking = !(flags & 1);
    s->priority = priority;
    state().streams.push_back(s);
    *out = s;
    return OK;
}
EXPORT int cuStreamCreate(void **out, unsigned flags) {
    entry e("cuStreamCreate", true, true);
    if (e.error) return e.error;
    stream *s = new stream();
    s->blocking = !(flags & 1);
    state().streams.push_back(s);
    *out = s;
    return OK;
}
EXPORT int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    entry e("cuCtxGetStreamPriorityRange");
    if (e.error) return e.error;
    *least = 0;
    *greatest = -5;
    return OK;
}
/* Drivers do not wait here: who destroys a stream, and then what its work uses, has to. */
EXPORT int cuStreamDestroy_v2(void *handle) {
    entry e("cuStreamDestroy_v2");
    stream *s = stream_of(handle);
    if (e.error || !s || s == &state().zero) return e.error ? e.error : INVALID_HANDLE;
    if (!work_done(s, s->last)) {
        fprintf(stderr, "cuda emulation: a stream is destroyed that is not done\n");
        abort();
    }
    auto &all = state().streams;
    all.erase(std::find(all.begin(), all.end(), s));
    delete s;
    return OK;
}
EXPORT int cuStreamSynchronize(void *handle) {
    entry e("cuStreamSynchronize");
    stream *s = stream_of(handle);
    if (e.error || !s) return e.error ? e.error : INVALID_HANDLE;
    if (s->capture) return CAPTURE_UNSUPPORTED;
    if (forgotten("cuStreamSynchronize", __builtin_return_address(0))) return OK;
    uint64_t number = s->last;
    work_wait(e.lock, [&] { return work_done(s, number); });
    return state().lost;
}
EXPORT int cuStreamQuery(void *handle) {
    entry e("cuStreamQuery");
    stream *s = stream_of(handle);
    if (e.error || !s) return e.error ? e.error : INVALID_HANDLE;
    if (forgotten("cuStreamQuery", __builtin_return_address(0))) return OK;
    uint64_t number = s->last;
    /* Who asks again and again leaves the lock to the work meanwhile. */
    if (!work_done(s, number)) state().changed.wait_for(e.lock, std::chrono::microseconds(20));
    return state().lost ? state().lost : work_done(s, number) ? OK : NOT_READY;
}
EXPORT int cuLaunchHostFunc(void *handle, void (*call)(void *), void *data) {
    entry e("cuLaunchHostFunc");
    stream *s = stream_of(handle);
    if (e.error || !s) return e.error ? e.error : INVALID_HANDLE;
    op what = {};
    what.kind = op::HOST;
    what.call = call;
    what.data = data;
    return submit(s, std::move(what));
}
static int value_call(const char *name, void *handle, uint64_t at, uint32_t value, unsigned flags, bool waits) {
    entry e(name);
    stream *s = stream_of(handle);
    if (e.error || !s) return e.error ? e.error : INVALID_HANDLE;
    op what = {};
    what.kind = waits ? op::WAIT_VALUE : op::WRITE_VALUE;
    what.to = (char *)(uintptr_t)at;
    what.value = value;
    what.flags = flags;
    if (at % 4 || memory_place(what.to, 4) == PAGEABLE) return INVALID_VALUE;
    return submit(s, std::move(what));
}
EXPORT int cuStreamWaitValue32_v2(void *stream, uint64_t at, uint32_t value, unsigned flags) {
    return value_call("cuStreamWaitValue32_v2", stream, at, value, flags, true);
}
EXPORT int cuStreamWriteValue32_v2(void *stream, uint64_t at, uint32_t value, unsigned flags) {
    return value_call("cuStreamWriteValue32_v2", stream, at, value, flags, false);
}

/* --- events ----------------------------------------------------------------------------------------------------- */
EXPORT int cuEventCreate(void **out, unsigned flags) {
    entry e("cuEventCreate", true, true);
    if (e.error) return e.error;
    event *made = new event();
    made->timing = !(flags & 2);
    *out = made;
    return OK;
}
EXPORT int cuEventDestroy_v2(void *handle) {
    entry e("cuEventDestroy_v2");
    if (e.error || !handle) return e.error ? e.error : INVALID_HANDLE;
    delete (event *)handle;
    return OK;
}
EXPORT int cuEventRecord(void *handle, void *of) {
    entry e("cuEventRecord");
    stream *s = stream_of(of);
    event *v = (event *)handle;
    if (e.error || !s || !v) return e.error ? e.error : INVALID_HANDLE;
    v->capture = s->capture;
    v->captured_last = s->captured_last;
    if (s->capture || forgotten("cuEventRecord", __builtin_return_address(0))) return OK;
    op what = {};
    what.kind = op::RECORD;
    what.at = v->at = std::make_shared<mark>();
    return submit(s, std::move(what));
}
EXPORT int cuEventQuery(void *handle) {
    entry e("cuEventQuery");
    event *v = (event *)handle;
    if (e.error || !v) return e.error ? e.error : INVALID_HANDLE;
    if (forgotten("cuEventQuery", __builtin_return_address(0))) return OK;
    return !v->at || v->at->done ? OK : NOT_READY;
}
EXPORT int cuEventSynchronize(void *handle) {
    entry e("cuEventSynchronize");
    event *v = (event *)handle;
    if (e.error || !v) return e.error ? e.error : INVALID_HANDLE;
    if (forgotten("cuEventSynchronize", __builtin_return_address(0))) return OK;
    auto at = v->at;
    work_wait(e.lock, [&] { return !at || at->done; });
    return state().lost;
}
EXPORT int cuEventElapsedTime(float *ms, void *from, void *to) {
    entry e("cuEventElapsedTime");
    event *a = (event *)from, *b = (event *)to;
    if (e.error || !a || !b || !a->at || !b->at || !a->timing || !b->timing)
        return e.error ? e.error : INVALID_HANDLE;
    if (!a->at->done || !b->at->done) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(b->at->when - a->at->when).count();
    return OK;
}
EXPORT int cuStreamWaitEvent(void *handle, void *of, unsigned) {
    entry e("cuStreamWaitEvent");
    stream *s = stream_of(handle);
    event *v = (event *)of;
    if (e.error || !s || !v) return e.error ? e.error : INVALID_HANDLE;
    if (v->capture) {
        if (s->capture && s->capture != v->capture) return CAPTURE_ISOLATION;
        s->capture = v->capture;
        s->captured_last.insert(s->captured_last.end(), v->captured_last.begin(), v->captured_last.end());
        return OK;
    }
    if (s->capture) return CAPTURE_ISOLATION;
    if (!v->at || forgotten("cuStreamWaitEvent", __builtin_return_address(0))) return OK;
    op what = {};
    what.kind = op::WAIT;
    what.at = v->at;
    return submit(s, std::move(what));
}

/* --- graphs ----------------------------------------------------------------------------------------------------- */
EXPORT int cuStreamBeginCapture_v2(void *handle, int) {
    entry e("cuStreamBeginCapture_v2", true, true);
    stream *s = stream_of(handle);
    if (e.error || !s || s == &state().zero || s->capture) return e.error ? e.error : CAPTURE_UNSUPPORTED;
    s->capture = std::make_shared<capture>(capture{ new graph(), s });
    s->captured_last.clear();
    return OK;
}
/* Whether every node comes before one of `last`, or is one. */
static bool joined(const graph &g, const std::vector<size_t> &last) {
    std::vector<char> reached(g.nodes.size());
    for (size_t i : last) reached[i] = 1;
    for (size_t i = g.nodes.size(); i-- > 0;)           /* nodes come after those that they wait for */
        if (reached[i]) for (size_t before : g.nodes[i]->after) reached[before] = 1;
    return std::find(reached.begin(), reached.end(), 0) == reached.end();
}
EXPORT int cuStreamEndCapture(void *handle, void **out) {
    entry e("cuStreamEndCapture");
    stream *s = stream_of(handle);
    if (e.error || !s || !s->capture) return e.error ? e.error : INVALID_VALUE;
    auto of = s->capture;
    if (of->origin != s) return CAPTURE_UNMATCHED;
    bool all = joined(*of->into, s->captured_last);
    for (stream *other : state().streams)
        if (other->capture == of) {
            other->capture = nullptr;
            other->captured_last.clear();
        }
    if (!all) delete of->into;
    *out = all ? of->into : nullptr;
    return all ? OK : CAPTURE_UNJOINED;
}
EXPORT int cuStreamIsCapturing(void *handle, int *status) {
    entry e("cuStreamIsCapturing");
    stream *s = stream_of(handle);
    if (e.error || !s) return e.error ? e.error : INVALID_HANDLE;
    *status = s->capture != nullptr;
    return OK;
}
EXPORT int cuGraphCreate(void **out, unsigned flags) {
    entry e("cuGraphCreate", true, true);
    if (e.error || flags) return e.error ? e.error : INVALID_VALUE;
    *out = new graph();
    return OK;
}
struct kernel_node_parameters {         /* CUDA_KERNEL_NODE_PARAMS_v2 */
    void *function;
    unsigned grid_x, grid_y, grid_z, size_x, size_y, size_z, shared;
    void **parameters, **extra;
    void *kernel, *context;
};
static int node_op(const kernel_node_parameters *p, op *what) {
    return launch_op(p->function, dim3(p->grid_x, p->grid_y, p->grid_z), dim3(p->size_x, p->size_y, p->size_z),
                     p->shared, p->parameters, what);
}
EXPORT int cuGraphAddKernelNode_v2(void **out, void *handle, void *const *before, size_t n,
                                   const kernel_node_parameters *p) {
    entry e("cuGraphAddKernelNode_v2", true, true);
    if (e.error || !handle) return e.error ? e.error : INVALID_VALUE;
    graph &g = *(graph *)handle;
    std::unique_ptr<node> made(new node());
    int error = node_op(p, &made->what);
    for (size_t i = 0; i < n && !error; i++) {
        size_t at = 0;
        while (at < g.nodes.size() && g.nodes[at].get() != before[i]) at++;
        if (at == g.nodes.size()) error = INVALID_VALUE;
        made->after.push_back(at);
    }
    if (error) return error;
    *out = made.get();
    g.nodes.push_back(std::move(made));
    return OK;
}
EXPORT int cuGraphGetNodes(void *handle, void **nodes, size_t *n) {
    entry e("cuGraphGetNodes");
    if (e.error) return e.error;
    graph *g = (graph *)handle;
    for (size_t i = 0; nodes && i < *n && i < g->nodes.size(); i++) nodes[i] = g->nodes[i].get();
    if (!nodes || *n > g->nodes.size()) *n = g->nodes.size();
    return OK;
}
EXPORT int cuGraphDestroy(void *handle) {
    entry e("cuGraphDestroy");
    if (!e.error) delete (graph *)handle;
    return e.error;
}
/* A graph that can be launched: copies of its nodes, known by them, whose parameters may be set anew. */
struct launchable {
    std::vector<op> ops;
    std::vector<std::vector<size_t>> after;
    std::vector<const node *> of;
    std::weak_ptr<graph_run> last;      /* the run that was launched last */
};
EXPORT int cuGraphInstantiateWithFlags(void **out, void *handle, unsigned long long) {
    entry e("cuGraphInstantiateWithFlags", true, true);
    if (e.error || !handle) return e.error ? e.error : INVALID_VALUE;
    launchable *made = new launchable();
    for (auto &n : ((graph *)handle)->nodes) {
        made->ops.push_back(n->what);
        made->after.push_back(n->after);
        made->of.push_back(n.get());
    }
    *out = made;
    return OK;
}
EXPORT int cuGraphExecDestroy(void *handle) {
    entry e("cuGraphExecDestroy");
    if (e.error) return e.error;
    auto last = ((launchable *)handle)->last.lock();
    if (last && last->n_done < last->ops.size() && !state().lost) {
        fprintf(stderr, "cuda emulation: a graph is destroyed that is not done\n");
        abort();
    }
    delete (launchable *)handle;
    return OK;
}
EXPORT int cuGraphLaunch(void *handle, void *of) {
    entry e("cuGraphLaunch", true, true);
    stream *s = stream_of(of);
    if (e.error || !s || !handle) return e.error ? e.error : INVALID_HANDLE;
    launchable *l = (launchable *)handle;
    op what = {};
    what.kind = op::GRAPH;
    what.run = std::make_shared<graph_run>();
    what.run->ops = l->ops;
    what.run->after = l->after;
    what.run->done.assign(l->ops.size(), 0);
    l->last = what.run;
    return submit(s, std::move(what));
}
EXPORT int cuGraphExecKernelNodeSetParams_v2(void *handle, void *of, const kernel_node_parameters *p) {
    entry e("cuGraphExecKernelNodeSetParams_v2");
    if (e.error) return e.error;
    launchable *l = (launchable *)handle;
    size_t i = (size_t)(std::find(l->of.begin(), l->of.end(), (const node *)of) - l->of.begin());
    if (i == l->of.size() || l->ops[i].kind != op::KERNEL) return INVALID_VALUE;
    return node_op(p, &l->ops[i]);
}
