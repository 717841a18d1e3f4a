/* Load generator: many connections from one thread, each with at most one message in flight (a closed loop).
 *
 *   load --mode exchange|churn|idle|fanout --port N... --connections N --size BYTES --greeting TEXT
 *        --seconds S --warmup S [--publishers N] [--tls] [--pid N]... [--engine-pid N]...
 *
 * exchange  on every connection: send a message, wait for the whole echo, repeat.
 * churn     connect, receive the greeting, exchange one message, send FIN, wait for the server's FIN, repeat.
 * idle      open the connections, exchange one message on each, keep them open, and measure the server's memory.
 * fanout    the first connections (--publishers) send a line, which the server sends to all connections. Each sends its
 *           next line when all connections have received the last one. Every line of every connection is compared: a
 *           lost, repeated or reordered one ends the run. The unit is a delivery: one line to one connection. No TLS.
 *
 * With several ports, connections are opened to them in rotation.
 *
 * Connections and TLS handshakes are made before the measurement. The CPU time of the server's processes (--pid) is
 * read from their clocks at the beginning and end of the measured window, in nanoseconds, for all threads; that of
 * Redis (--engine-pid) is counted separately. One JSON object is printed at the end. A wrong or missing echo or line
 * ends the run with a message and status 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <signal.h>

#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#else
typedef void SSL;
#endif

enum mode { EXCHANGE, CHURN, IDLE, FANOUT };

enum phase {
    HANDSHAKING, /* TLS */
    GREETING,    /* waiting for the rest of the server's greeting */
    WAITING,     /* open and silent: other connections are not up yet, or the mode is idle */
    ECHOING,     /* a message is in flight */
    LISTENING,   /* receives lines (fanout) */
    CLOSING,     /* FIN is sent, the server's is not received yet */
};

struct connection {
    int fd;
    SSL *ssl;
    enum phase phase;
    uint32_t interest; /* the events that epoll watches */
    size_t sent, received;
    uint64_t sequence; /* written into each message, to detect the echo of an earlier one */
    uint64_t started;
    char *partial;        /* fanout: the beginning of a line, `received` bytes */
    uint32_t *last_lines; /* fanout: for each publisher, the number of the last line received */
};

/* The line of a publisher that is on its way. */
struct publication {
    char *line;
    uint32_t number;
    int missing; /* connections that have not received it */
    uint64_t started;
};

/* A burst of connects stays below the backlog of 50 of some servers: a client whose SYN is dropped retries only after a
 * second. */
enum { OPENING_AT_ONCE = 32, MAX_EVENTS = 1024, MAX_PIDS = 64, MAX_PORTS = 16 };

/* Digits of the publisher and of the number at the beginning of a line. */
enum { DIGITS = 8, HEAD = 2 * DIGITS };

/* A client that closes first keeps its port in TIME_WAIT. churn rotates among this many source addresses, so that
 * 28,000 ports are not exhausted. */
enum { SOURCES = 64 };

static enum mode mode = EXCHANGE;
static int ports[MAX_PORTS], port_count, connections = 1, publishers = 1;
static size_t size = 64;
static double seconds = 1, warmup = 0.2;
static const char *greeting = "";
static size_t greeting_length;
static bool tls;
struct processes {
    pid_t pids[MAX_PIDS];
    int count;
};

static struct processes server, engine;

static int epoll_fd;
static struct connection *table;
static int opened, opening, up; /* connections begun; begun and not yet up; up */
static char *message, *incoming;
static size_t room; /* bytes of `incoming` */
static struct publication *publications;
static uint64_t finished; /* exchanges since the window began */

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* -- latency: a histogram with 128 steps per power of two, so every figure is within 0.8 % ------------------------ */

enum { STEPS_LOG2 = 7, STEPS = 1 << STEPS_LOG2, CELLS = (64 - STEPS_LOG2 + 1) << STEPS_LOG2 };
static uint64_t histogram[CELLS];

static void record(uint64_t nanoseconds)
{
    unsigned exponent = 63 - (unsigned)__builtin_clzll(nanoseconds | 1);
    unsigned cell = exponent < STEPS_LOG2
                        ? (unsigned)nanoseconds
                        : ((exponent - STEPS_LOG2 + 1) << STEPS_LOG2)
                              | ((unsigned)(nanoseconds >> (exponent - STEPS_LOG2)) & (STEPS - 1));
    histogram[cell]++;
    finished++;
}

static double percentile_us(double share)
{
    uint64_t rank = (uint64_t)(share * (double)finished), seen = 0;
    for (unsigned cell = 0; cell < CELLS; cell++) {
        seen += histogram[cell];
        if (histogram[cell] && seen > rank) {
            if (cell < STEPS)
                return cell / 1e3;
            unsigned shift = (cell >> STEPS_LOG2) - 1;
            return (double)((uint64_t)(STEPS + (cell & (STEPS - 1))) << shift) * (1 + 0.5 / STEPS) / 1e3;
        }
    }
    return 0;
}

/* -- cost of the server ------------------------------------------------------------------------------------------- */

static double cpu_seconds(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t) < 0)
        fail("the server's CPU clock cannot be read: %s (has it exited?)", strerror(errno));
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double cpu_seconds_of(const struct processes *processes)
{
    double sum = 0;
    for (int i = 0; i < processes->count; i++) {
        clockid_t clock;
        int error = clock_getcpuclockid(processes->pids[i], &clock);
        if (error)
            fail("process %d of the server: %s (has it exited?)", (int)processes->pids[i], strerror(error));
        sum += cpu_seconds(clock);
    }
    return sum;
}

static long server_resident_kib(void)
{
    long sum = 0;
    for (int i = 0; i < server.count; i++) {
        char path[64], line[256];
        long kib = -1;
        snprintf(path, sizeof path, "/proc/%d/smaps_rollup", (int)server.pids[i]);
        FILE *file = fopen(path, "r");
        if (!file)
            fail("%s: %s", path, strerror(errno));
        while (fgets(line, sizeof line, file) && sscanf(line, "Rss: %ld kB", &kib) != 1)
            ;
        fclose(file);
        if (kib < 0)
            fail("%s: no Rss line", path);
        sum += kib;
    }
    return sum;
}

/* -- bytes, plain or TLS: both return the count, 0 at the end of the stream, -1 if it would block ----------------- */

static void watch(struct connection *c, uint32_t interest)
{
    if (c->interest == interest)
        return;
    struct epoll_event event = {.events = interest, .data.ptr = c};
    if (epoll_ctl(epoll_fd, c->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event) < 0)
        fail("epoll_ctl: %s", strerror(errno));
    c->interest = interest;
}

#ifdef WITH_TLS
static SSL_CTX *tls_context;

static void tls_start(void)
{
    tls_context = SSL_CTX_new(TLS_client_method());
    /* The suite that is mandatory in TLS 1.3 (RFC 8446, section 9.1): all servers do the same work. */
    if (!tls_context || !SSL_CTX_set_min_proto_version(tls_context, TLS1_3_VERSION)
        || !SSL_CTX_set_ciphersuites(tls_context, "TLS_AES_128_GCM_SHA256"))
        fail("OpenSSL could not be set up");
    SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(tls_context, 1);
}

static ssize_t tls_answer(struct connection *c, int result)
{
    if (result > 0)
        return result;
    switch (SSL_get_error(c->ssl, result)) {
    case SSL_ERROR_WANT_READ:
        return -1;
    case SSL_ERROR_WANT_WRITE:
        watch(c, EPOLLIN | EPOLLOUT);
        return -1;
    case SSL_ERROR_ZERO_RETURN:
        return 0;
    default: {
        const char *reason = ERR_reason_error_string(ERR_peek_last_error());
        fail("TLS failed in the %s: %s", c->phase == HANDSHAKING ? "handshake" : "exchange",
             reason ? reason : "the server closed the connection");
        return 0;
    }
    }
}
#endif

static ssize_t receive(struct connection *c, void *buffer, size_t length)
{
#ifdef WITH_TLS
    if (c->ssl) {
        ERR_clear_error();
        return tls_answer(c, SSL_read(c->ssl, buffer, (int)length));
    }
#endif
    ssize_t n = recv(c->fd, buffer, length, 0);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        fail("recv: %s", strerror(errno));
    return n;
}

static ssize_t transmit(struct connection *c, const void *buffer, size_t length)
{
#ifdef WITH_TLS
    if (c->ssl) {
        ERR_clear_error();
        return tls_answer(c, SSL_write(c->ssl, buffer, (int)length));
    }
#endif
    ssize_t n = send(c->fd, buffer, length, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        fail("send: %s", strerror(errno));
    return n;
}

/* -- connections -------------------------------------------------------------------------------------------------- */

static void advance(struct connection *c);

static void open_connection(struct connection *c)
{
    static unsigned turn;
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        fail("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (mode == CHURN) {
        struct sockaddr_in source = {.sin_family = AF_INET};
        source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + turn++ % SOURCES);
        setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(c->fd, (struct sockaddr *)&source, sizeof source) < 0)
            fail("bind: %s", strerror(errno));
    }
    c->interest = 0;
    c->received = 0;
    c->phase = tls ? HANDSHAKING : GREETING;
    c->started = now();
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)ports[(c - table) % port_count])};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
    watch(c, EPOLLIN);
#ifdef WITH_TLS
    if (tls) {
        c->ssl = SSL_new(tls_context);
        SSL_set_fd(c->ssl, c->fd);
        SSL_set_connect_state(c->ssl);
        advance(c);
    }
#endif
}

static void close_connection(struct connection *c)
{
#ifdef WITH_TLS
    if (c->ssl)
        SSL_free(c->ssl);
    c->ssl = NULL;
#endif
    close(c->fd);
}

static void open_more(void)
{
    while (opened < connections && opening < OPENING_AT_ONCE) {
        opening++;
        open_connection(&table[opened++]);
    }
}

static void send_rest(struct connection *c)
{
    memcpy(message, &c->sequence, sizeof c->sequence); /* all connections share the buffer */
    ssize_t n = transmit(c, message + c->sent, size - c->sent);
    if (n > 0)
        c->sent += (size_t)n;
    watch(c, c->sent < size ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

static void start_message(struct connection *c)
{
    c->phase = ECHOING;
    c->sent = c->received = 0;
    c->sequence += 1 + (uint64_t)(c - table);
    if (mode == EXCHANGE)
        c->started = now();
    send_rest(c);
}

/* Compares both ends of every chunk, and each byte of every sixteenth message. */
static void verify(struct connection *c, size_t length)
{
    memcpy(message, &c->sequence, sizeof c->sequence);
    const char *expected = message + c->received;
    size_t edge = length < 16 ? length : 16;
    bool right = c->sequence % 16 == 0
                     ? !memcmp(incoming, expected, length)
                     : !memcmp(incoming, expected, edge)
                           && !memcmp(incoming + length - edge, expected + length - edge, edge);
    if (!right)
        fail("the echo differs from the message: in %zu bytes at offset %zu of %zu", length, c->received, size);
}

/* -- fan-out ------------------------------------------------------------------------------------------------------ */

static void prepare_publications(void)
{
    publications = calloc((size_t)publishers, sizeof *publications);
    if (!publications)
        fail("out of memory");
    for (int i = 0; i < publishers; i++) {
        char *line = publications[i].line = malloc(size);
        if (!line)
            fail("out of memory");
        for (size_t at = HEAD; at < size - 1; at++)
            line[at] = (char)('a' + at % 26);
        line[size - 1] = '\n';
    }
    for (int i = 0; i < connections; i++) {
        table[i].partial = malloc(size);
        table[i].last_lines = calloc((size_t)publishers, sizeof *table[i].last_lines);
        if (!table[i].partial || !table[i].last_lines)
            fail("out of memory");
    }
}

static void publish(int publisher)
{
    struct publication *p = &publications[publisher];
    char head[HEAD + 1];
    p->number++;
    p->missing = connections;
    snprintf(head, sizeof head, "%0*x%0*x", DIGITS, (unsigned)publisher, DIGITS, p->number);
    memcpy(p->line, head, HEAD);
    p->started = now();
    if (transmit(&table[publisher], p->line, size) != (ssize_t)size)
        fail("the server does not read the line of a publisher");
}

static void take_line(struct connection *c, const char *line, uint64_t at)
{
    char digits[DIGITS + 1] = "";
    memcpy(digits, line, DIGITS);
    unsigned long publisher = strtoul(digits, NULL, 16);
    struct publication *p = publisher < (unsigned long)publishers ? &publications[publisher] : NULL;
    if (!p || memcmp(line, p->line, size) || c->last_lines[publisher] != p->number - 1)
        fail("a line is lost, repeated or changed: %.*s", (int)size - 1, line);
    c->last_lines[publisher] = p->number;
    record(at - p->started);
    if (--p->missing == 0)
        publish((int)publisher);
}

static void take_lines(struct connection *c)
{
    memcpy(incoming, c->partial, c->received);
    ssize_t n = receive(c, incoming + c->received, room - c->received);
    if (n < 0)
        return;
    if (n == 0)
        fail("the server closed a connection");
    size_t end = c->received + (size_t)n, begin = 0;
    for (uint64_t at = now(); end - begin >= size; begin += size)
        take_line(c, incoming + begin, at);
    c->received = end - begin;
    memcpy(c->partial, incoming + begin, c->received);
}

static void greeted(struct connection *c)
{
    if (mode == CHURN || mode == IDLE) {
        start_message(c);
        return;
    }
    c->phase = mode == FANOUT ? LISTENING : WAITING;
    c->received = 0;
    opening--;
    up++;
    open_more();
}

static void echoed(struct connection *c)
{
    if (mode == EXCHANGE) {
        record(now() - c->started);
        start_message(c);
    } else if (mode == IDLE) {
        c->phase = WAITING;
        opening--;
        up++;
        open_more();
    } else {
        c->phase = CLOSING;
#ifdef WITH_TLS
        if (c->ssl)
            SSL_shutdown(c->ssl);
#endif
        shutdown(c->fd, SHUT_WR);
    }
}

/* Sends and receives without blocking; called when the socket is ready. */
static void advance(struct connection *c)
{
    ssize_t n;
    switch (c->phase) {
    case HANDSHAKING:
#ifdef WITH_TLS
        watch(c, EPOLLIN);
        n = tls_answer(c, SSL_do_handshake(c->ssl));
        if (n < 0)
            return;
        c->phase = GREETING;
#endif
        /* fall through */
    case GREETING:
        n = receive(c, incoming, greeting_length - c->received);
        if (n < 0)
            return;
        if (n == 0)
            fail("the server closed a connection before its greeting");
        if (memcmp(incoming, greeting + c->received, (size_t)n))
            fail("unexpected greeting: %.*s", (int)n, incoming);
        c->received += (size_t)n;
        if (c->received == greeting_length)
            greeted(c);
        return;
    case ECHOING:
        if (c->sent < size)
            send_rest(c);
        for (;;) {
            size_t missing = size - c->received;
            n = receive(c, incoming, missing);
            if (n < 0)
                return;
            if (n == 0)
                fail("the server closed a connection during an exchange");
            verify(c, (size_t)n);
            c->received += (size_t)n;
            if (c->received == size) {
                echoed(c);
                return;
            }
            if (!c->ssl)
                return; /* less than requested: the socket is empty, and epoll reports more */
        }
    case LISTENING:
        take_lines(c);
        return;
    case WAITING:
        n = receive(c, incoming, 1);
        if (n >= 0)
            fail(n ? "the server sent more than the echo" : "the server closed an idle connection");
        return;
    case CLOSING:
        n = receive(c, incoming, 1);
        if (n < 0)
            return;
        if (n > 0)
            fail("the server sent more than the echo");
        record(now() - c->started);
        close_connection(c);
        open_connection(c);
        return;
    }
}

static void run_until(uint64_t deadline, const int *reached, int target)
{
    static struct epoll_event events[MAX_EVENTS];
    for (;;) {
        uint64_t t = now();
        if ((reached && *reached >= target) || t >= deadline)
            return;
        int milliseconds = (int)((deadline - t) / 1000000u) + 1;
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, milliseconds);
        if (n < 0 && errno != EINTR)
            fail("epoll_wait: %s", strerror(errno));
        for (int i = 0; i < n; i++)
            advance(events[i].data.ptr);
    }
}

/* -- the run ------------------------------------------------------------------------------------------------------ */

static uint64_t after(double duration)
{
    return now() + (uint64_t)(duration * 1e9);
}

static void open_all(int count)
{
    connections = count;
    open_more();
    run_until(after(60), &up, count);
    if (up < count)
        fail("only %d of %d connections were up after a minute", up, count);
}

static void measure_memory(void)
{
    int count = connections;
    /* The first connections also cause lazy initialization in the server, which is not a cost per connection. */
    open_all(count < 100 ? 1 : 100);
    int first = up;
    usleep(300000);
    long before = server_resident_kib();
    open_all(count);
    run_until(after(0.5), NULL, 0);
    long grown = server_resident_kib() - before;
    printf("{\"connections\": %d, \"resident_kib_before\": %ld, \"resident_kib_grown\": %ld}\n", count - first,
           before, grown);
}

static void measure_exchanges(void)
{
    if (mode == CHURN) {
        opened = connections;
        for (int i = 0; i < connections; i++)
            open_connection(&table[i]);
    } else {
        open_all(connections);
        if (mode == FANOUT)
            for (int i = 0; i < publishers; i++)
                publish(i);
        else
            for (int i = 0; i < connections; i++)
                start_message(&table[i]);
    }
    run_until(after(warmup), NULL, 0);

    memset(histogram, 0, sizeof histogram);
    finished = 0;
    uint64_t began = now();
    double of_server = cpu_seconds_of(&server), of_engine = cpu_seconds_of(&engine);
    double own = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID);
    run_until(after(seconds), NULL, 0);
    double elapsed = (double)(now() - began) / 1e9;
    of_server = cpu_seconds_of(&server) - of_server;
    of_engine = cpu_seconds_of(&engine) - of_engine;
    own = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID) - own;
    for (int i = 0; mode == FANOUT && i < publishers; i++)
        if (!finished || now() - publications[i].started > 1000000000u)
            fail("a line has not reached %d of %d connections", publications[i].missing, connections);
    if (!finished)
        fail("no exchange was finished in %.1f s", elapsed);
    printf("{\"messages\": %llu, \"seconds\": %.6f, \"server_cpu_seconds\": %.6f, \"engine_cpu_seconds\": %.6f, "
           "\"load_cpu_seconds\": %.6f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f}\n",
           (unsigned long long)finished, elapsed, of_server, of_engine, own, percentile_us(0.5), percentile_us(0.99),
           percentile_us(0.999));
}

static void parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"mode", required_argument, NULL, 'm'},     {"port", required_argument, NULL, 'p'},
        {"connections", required_argument, NULL, 'c'}, {"size", required_argument, NULL, 's'},
        {"greeting", required_argument, NULL, 'g'}, {"seconds", required_argument, NULL, 't'},
        {"warmup", required_argument, NULL, 'w'},   {"tls", no_argument, NULL, 'T'},
        {"pid", required_argument, NULL, 'P'},      {"engine-pid", required_argument, NULL, 'E'},
        {"publishers", required_argument, NULL, 'n'}, {NULL, 0, NULL, 0},
    };
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'm':
            mode = !strcmp(optarg, "churn")    ? CHURN
                   : !strcmp(optarg, "idle")   ? IDLE
                   : !strcmp(optarg, "fanout") ? FANOUT
                                               : EXCHANGE;
            break;
        case 'p':
            if (port_count < MAX_PORTS)
                ports[port_count++] = atoi(optarg);
            break;
        case 'n': publishers = atoi(optarg); break;
        case 'c': connections = atoi(optarg); break;
        case 's': size = (size_t)atol(optarg); break;
        case 'g': greeting = optarg; break;
        case 't': seconds = atof(optarg); break;
        case 'w': warmup = atof(optarg); break;
        case 'T': tls = true; break;
        case 'P':
        case 'E': {
            struct processes *processes = option == 'P' ? &server : &engine;
            if (processes->count < MAX_PIDS)
                processes->pids[processes->count++] = (pid_t)atoi(optarg);
            break;
        }
        default: exit(2);
        }
    }
    greeting_length = strlen(greeting);
    if (mode == FANOUT && (tls || publishers <= 0 || publishers > connections || size <= HEAD))
        fail("fanout: no TLS, one publisher for each connection at most, lines of at least %d bytes", HEAD + 1);
    if (!port_count || ports[0] <= 0 || connections <= 0 || size < sizeof(uint64_t) || seconds <= 0 || !greeting_length)
        fail("required: --port, --greeting, at least one connection, messages of at least 8 bytes");
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    alarm((unsigned)(seconds + warmup) + 120); /* bounds a run that hangs */
    room = size > greeting_length ? size : greeting_length;
    if (mode == FANOUT && room < 65536)
        room = 65536;
    table = calloc((size_t)connections, sizeof *table);
    message = malloc(room);
    incoming = malloc(room);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (!table || !message || !incoming || epoll_fd < 0)
        fail("out of memory or descriptors");
    for (size_t i = 0; i < size; i++)
        message[i] = (char)(i * 131 >> 3);
    if (tls) {
#ifdef WITH_TLS
        tls_start();
#else
        fail("built without OpenSSL");
#endif
    }
    if (mode == FANOUT)
        prepare_publications();
    if (mode == IDLE)
        measure_memory();
    else
        measure_exchanges();
    return 0;
}
