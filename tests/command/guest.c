/* What a program can do where there is binder in the kernel, and over FUSE only with `mount.py run`: calls with NULL for an
 * argument, and mounts of its own. Prints a line for each.
 *
 *   cc -static -o guest guest.c && ./guest
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/android/binder.h>
#include <linux/android/binderfs.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[] = "/tmp/guest-XXXXXX";

static long say(const char *what, long result)
{
	int error = errno;

	printf("%s -> %ld%s%s\n", what, result, result < 0 ? " " : "", result < 0 ? strerrorname_np(error) : "");
	fflush(stdout);
	return result;
}

#define TRY(expression) say(#expression, (long)(expression))

/* A heading, out at once: a child would say it again. */
static void section(const char *title)
{
	printf("# %s\n", title);
	fflush(stdout);
}

static int add(const char *binderfs, const char *name)
{
	struct binderfs_device device = { 0 };
	char path[256];
	int fd, result;

	strncpy(device.name, name, BINDERFS_MAX_NAME);
	snprintf(path, sizeof path, "%s/binder-control", binderfs);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fd;
	result = ioctl(fd, BINDER_CTL_ADD, &device);
	close(fd);
	return result;
}

static int there(const char *path)
{
	return access(path, F_OK);
}

/* Run in a child, as another user with `uid` not 0; its output is in order, since its end is waited for. */
static void in_child(unsigned uid, void (*body)(void))
{
	pid_t child = fork();

	if (!child) {
		if (uid && (setgid(uid) || setuid(uid)))
			_exit(99);
		body();
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

static void without_rights(void)
{
	TRY(mount("binder", "inner", "binder", 0, NULL));
}

static void in_user_namespace(void)
{
	struct binder_version version;
	struct stat st;
	int fd;

	TRY(unshare(CLONE_NEWUSER | CLONE_NEWNS));
	/* Who is nobody here has no right to the folder, but to mount he needs none. */
	fd = open("/proc/self/setgroups", O_WRONLY);
	TRY(write(fd, "deny", 4));
	close(fd);
	fd = open("/proc/self/uid_map", O_WRONLY);
	TRY(write(fd, "0 0 1", 5));
	close(fd);
	fd = open("/proc/self/gid_map", O_WRONLY);
	TRY(write(fd, "0 0 1", 5));
	close(fd);
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(stat("inner/binder", &st));
	printf("owner %u\n", st.st_uid);
	TRY(add("inner", "deep"));
	fd = open("inner/deep", O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_VERSION, &version));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	close(fd);
	TRY(umount("inner"));
}

static void in_another_root(void)
{
	TRY(chroot("."));
	TRY(mount("binder", "/inner", "binder", 0, NULL));
	TRY(there("/inner/binder-control"));
	TRY(umount("/inner"));
}

int main(void)
{
	struct binder_version version;
	char line[256], found = 0;
	FILE *file;
	int fd, null;

	if (!mkdtemp(folder) || chdir(folder) || mkdir("inner", 0755) || chmod(".", 0755))
		return 1;

	file = fopen("/proc/filesystems", "r");
	while (file && fgets(line, sizeof line, file))
		found |= !strcmp(line, "nodev\tbinder\n");
	if (file)
		fclose(file);
	printf("/proc/filesystems names binder: %d\n", found);

	section("NULL for an argument");
	fd = open("/dev/binderfs/binder", O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_THREAD_EXIT, NULL));
	TRY(ioctl(fd, BINDER_VERSION, NULL));
	TRY(ioctl(fd, BINDER_SET_MAX_THREADS, NULL));
	TRY(ioctl(fd, BINDER_VERSION, &version));
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	TRY(ioctl(null, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(-1, BINDER_THREAD_EXIT, NULL));
	close(null);
	close(fd);

	section("mounts");
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(there("inner/binder"));
	TRY(there("inner/binder_logs"));
	TRY(add("inner", "mine"));
	fd = open("inner/mine", O_RDWR | O_CLOEXEC);
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(ioctl(fd, BINDER_SET_CONTEXT_MGR, NULL));
	TRY(umount("inner"));
	close(fd);
	TRY(umount2("inner", MNT_DETACH));
	TRY(there("inner/binder"));
	TRY(umount("inner"));
	snprintf(line, sizeof line, "%s/inner", folder);
	TRY(mount(NULL, line, "binder", MS_NOSUID | MS_NOATIME, "max=4,stats=global"));
	TRY(there("inner/binder_logs/state"));
	TRY(add("inner", "a"));
	TRY(add("inner", "b"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT, "max=5,stats=global"));
	TRY(add("inner", "b"));
	TRY(mount(NULL, "inner", "binder", MS_REMOUNT, "max=5"));
	TRY(mount(NULL, "inner", "binder", MS_REMOUNT, "max=no,stats=global"));
	TRY(mount(NULL, "inner", "binder", MS_REMOUNT, "stats=global"));
	TRY(add("inner", "c"));
	TRY(mount("binder", "inner", "binder", 0, NULL));
	TRY(there("inner/c"));
	TRY(umount("inner"));
	TRY(there("inner/c"));
	TRY(umount("inner"));

	section("mounts that fail");
	TRY(mount("binder", "inner", "binder", 0, "max=2"));
	TRY(mount("binder", "inner", "binder", 0, "max=-1"));
	TRY(mount("binder", "inner", "binder", 0, "foo"));
	TRY(mount("binder", "nothing", "binder", 0, NULL));
	TRY(mount("binder", "/proc/version", "binder", 0, NULL));
	TRY(mount("binder", NULL, "binder", 0, NULL));
	TRY(mount("binder", "inner", (void *)8, 0, NULL));
	TRY(mount("binder", "inner", "binder", 0, (void *)8));
	TRY(mount("binder", "inner", "bindery", 0, NULL));
	in_child(1234, without_rights);

	section("mounts of other types");
	TRY(mount("tmpfs", "inner", "tmpfs", 0, "size=4k"));
	TRY(mount(NULL, "inner", NULL, MS_REMOUNT | MS_RDONLY, NULL));
	TRY(open("inner/x", O_CREAT | O_WRONLY, 0600));
	TRY(umount("inner"));
	TRY(mount("/dev/binderfs", "inner", "binder", MS_BIND, NULL));
	TRY(there("inner/binder"));
	TRY(umount("inner"));

	section("elsewhere");
	in_child(0, in_user_namespace);
	in_child(0, in_another_root);
	TRY(rmdir("inner"));
	TRY(rmdir(folder));
	return 0;
}
