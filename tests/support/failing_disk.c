/* A disk that fails at one of a process's calls. Loaded with LD_PRELOAD; the environment says
   DISK     the path below which calls count,
   FAILS_AT the first call that fails, from 1 (0: none),
   FAILURE  its errno,
   FOREVER  if set, every later call that needs room fails, too, as on a disk that is full,
   CALLS    a file that gets a line for each call. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static long calls;

static int is_on_disk(const char *path) {
    const char *disk = getenv("DISK");
    char whole[8192] = "";
    if (!disk || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, 4096)) return 0;
        strcat(whole, "/");
    }
    strncat(whole, path, 4000);
    return !strncmp(whole, disk, strlen(disk));
}

static const char *name_of(int file, char *name) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, name, 4095);
    name[n < 0 ? 0 : n] = 0;
    return name;
}

/* Whether a call fails; `grows` is whether it needs room. */
static int fails(const char *call, const char *path, int grows) {
    if (!is_on_disk(path)) return 0;
    long number = __sync_add_and_fetch(&calls, 1), at = atol(getenv("FAILS_AT") ?: "0");
    const char *log = getenv("CALLS");
    if (log) {
        char line[4200];
        int n = snprintf(line, sizeof line, "%s %.4000s\n", call, path);
        long file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        syscall(SYS_write, file, line, n);
        syscall(SYS_close, file);
    }
    if (!at || !(number == at || (number > at && grows && getenv("FOREVER")))) return 0;
    errno = atoi(getenv("FAILURE"));
    return 1;
}

#define NEXT(call) ((__typeof__(&call))dlsym(RTLD_NEXT, #call))
#define OF_FILE(type, call, grows, parameters, ...)                                                \
    type call parameters {                                                                         \
        char name[4096];                                                                           \
        int saved = errno;                                                                         \
        if (file > 2 && fails(#call, name_of(file, name), grows)) return -1;                       \
        errno = saved;                                                                             \
        return NEXT(call)(__VA_ARGS__);                                                            \
    }
#define OF_PATH(call, grows, parameters, ...)                                                      \
    int call parameters {                                                                          \
        if (fails(#call, path, grows)) return -1;                                                  \
        return NEXT(call)(__VA_ARGS__);                                                            \
    }

OF_FILE(ssize_t, write, 1, (int file, const void *bytes, size_t n), file, bytes, n)
OF_FILE(ssize_t, writev, 1, (int file, const struct iovec *parts, int n), file, parts, n)
OF_FILE(ssize_t, pwrite64, 1, (int file, const void *bytes, size_t n, off64_t at), file, bytes, n, at)
OF_FILE(int, fsync, 0, (int file), file)
OF_FILE(int, ftruncate64, 0, (int file, off64_t size), file, size)
OF_PATH(mkdir, 1, (const char *path, mode_t mode), path, mode)
OF_PATH(chmod, 0, (const char *path, mode_t mode), path, mode)
OF_PATH(unlink, 0, (const char *path), path)
OF_PATH(rmdir, 0, (const char *path), path)
OF_PATH(rename, 1, (const char *from, const char *path), from, path)

int unlinkat(int folder, const char *path, int flags) {
    char name[4096];
    if (fails("unlinkat", path[0] == '/' ? path : name_of(folder, name), 0)) return -1;
    return NEXT(unlinkat)(folder, path, flags);
}

#define OPENING(call)                                                                              \
    int call(const char *path, int flags, ...) {                                                   \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                    \
        va_end(more);                                                                              \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT) && fails("open", path, flags & O_CREAT))         \
            return -1;                                                                             \
        return NEXT(call)(path, flags, mode);                                                      \
    }
OPENING(open)
OPENING(open64)
