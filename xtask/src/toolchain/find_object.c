// gcc's unwinder calls a function of the C library to find the object of an address and its unwind tables. glibc has it since 2.35, musl
// does not. This implementation uses functions that both have. Without it a static executable does not link, and one that returns
// "not found" aborts at its first backtrace.
//
// The structure is that of <dlfcn.h> of glibc.
#define _GNU_SOURCE
#include <link.h>
#include <pthread.h>
#include <stddef.h>

// The unwinder calls these if they exist, but checks only one of them: without this a static link omits some.
__attribute__((used)) static void *const needed[] = {
    (void *)pthread_once,        (void *)pthread_mutex_lock,  (void *)pthread_mutex_unlock,
    (void *)pthread_key_create,  (void *)pthread_getspecific, (void *)pthread_setspecific,
};

struct found {
    unsigned long long flags;
    void *start, *end;
    void *link_map;
    void *eh_frame;
#ifdef __i386__
    void *eh_dbase;
    unsigned int pad;
#endif
    unsigned long long reserved[7];
};

struct search {
    ElfW(Addr) address;
    struct found *found;
};

static int look(struct dl_phdr_info *object, size_t size, void *data) {
    struct search *search = data;
    struct found found = {0};
    (void)size;
    for (int at = 0; at < object->dlpi_phnum; at++) {
        const ElfW(Phdr) *segment = &object->dlpi_phdr[at];
        ElfW(Addr) start = object->dlpi_addr + segment->p_vaddr, end = start + segment->p_memsz;
        if (segment->p_type == PT_LOAD && start <= search->address && search->address < end) {
            found.start = (void *)start;
            found.end = (void *)end;
        }
        if (segment->p_type == PT_GNU_EH_FRAME)
            found.eh_frame = (void *)start;
    }
    if (!found.start || !found.eh_frame)
        return 0;
    *search->found = found;
    return 1;
}

int _dl_find_object(void *address, struct found *found) {
    struct search search = {(ElfW(Addr))address, found};
    return dl_iterate_phdr(look, &search) ? 0 : -1;
}
