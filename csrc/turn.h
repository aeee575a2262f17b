/* turn.h -- a lock whose waiters come in the order in which they asked, so that nobody waits longer than one turn of
 * each of the others. */
#ifndef MS4_TURN_H
#define MS4_TURN_H
#include <pthread.h>
#include <stdint.h>
typedef struct { pthread_mutex_t lock; pthread_cond_t moved; uint64_t next, now; } turn;

static inline void turn_open(turn *t) {
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->moved, NULL);
    t->next = t->now = 0;
}
static inline void turn_close(turn *t) {
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->moved);
}
static inline void turn_take(turn *t) {
    pthread_mutex_lock(&t->lock);
    for (uint64_t mine = t->next++; t->now != mine;) pthread_cond_wait(&t->moved, &t->lock);
    pthread_mutex_unlock(&t->lock);
}
static inline void turn_give(turn *t) {
    pthread_mutex_lock(&t->lock);
    t->now++;
    pthread_cond_broadcast(&t->moved);
    pthread_mutex_unlock(&t->lock);
}
#endif
