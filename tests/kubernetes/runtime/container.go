package runtime

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	oci "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// container is a container of a pod, from CreateContainer until it is removed.
type container struct {
	id      string
	sandbox *sandbox
	config  *cri.ContainerConfig
	spec    *oci.Spec
	bundle  string
	log     string
	created time.Time
	// ended is closed when the first process has ended and its exit is noted.
	ended chan struct{}

	mutex    sync.Mutex
	pid      int
	started  time.Time
	finished time.Time
	exit     int
	removed  bool
}

func newContainer(options Options, sandbox *sandbox, config *cri.ContainerConfig) (*container, error) {
	image, err := options.imageFolder(config.Image.Image)
	if err != nil {
		return nil, err
	}
	made := &container{
		id: uuid.NewString(), sandbox: sandbox, config: config, created: time.Now(), ended: make(chan struct{}),
	}
	made.bundle = filepath.Join(options.State, made.id)
	if sandbox.config.LogDirectory != "" && config.LogPath != "" {
		made.log = filepath.Join(sandbox.config.LogDirectory, config.LogPath)
	}
	root := filepath.Join(made.bundle, "rootfs")
	if made.spec, err = specification(options, made.id, root, sandbox.config, config); err != nil {
		return nil, err
	}
	if err := made.makeBundle(image, root); err != nil {
		made.remove()
		return nil, err
	}
	return made, nil
}

// makeBundle makes what runc wants: a root and config.json.
func (c *container) makeBundle(image, root string) error {
	upper, work := filepath.Join(c.bundle, "upper"), filepath.Join(c.bundle, "work")
	for _, folder := range []string{root, upper, work} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
	}
	layers := fmt.Sprintf("lowerdir=%s:/,upperdir=%s,workdir=%s", escaped(image), upper, work)
	if err := unix.Mount("overlay", root, "overlay", 0, layers); err != nil {
		return fmt.Errorf("mount the root of container %s (%s): %w", c.id, layers, err)
	}
	config, err := json.Marshal(c.spec)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.bundle, "config.json"), config, 0o600)
}

// escaped is a path as an overlay's option: a colon would end the layer.
func escaped(path string) string {
	return strings.ReplaceAll(path, ":", `\:`)
}

// start runs the container's command. An error says what runc said.
func (c *container) start() error {
	stdout, err := c.logger("stdout")
	if err != nil {
		return err
	}
	defer stdout.Close()
	stderr, err := c.logger("stderr")
	if err != nil {
		return err
	}
	defer stderr.Close()
	pidFile := filepath.Join(c.bundle, "pid")
	said := filepath.Join(c.bundle, "runc.log")
	create := exec.Command("runc", "--log", said, "create", "--bundle", c.bundle, "--pid-file", pidFile, c.id)
	// The container inherits these.
	create.Stdout, create.Stderr = stdout, stderr
	if err := create.Run(); err != nil {
		return c.failed("create", said, err)
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		return err
	}
	c.mutex.Lock()
	c.pid, c.started = pid, time.Now()
	c.mutex.Unlock()
	go c.wait(pid)
	start := exec.Command("runc", "--log", said, "start", c.id)
	if err := start.Run(); err != nil {
		return c.failed("start", said, err)
	}
	return nil
}

func (c *container) failed(step, said string, err error) error {
	text, _ := os.ReadFile(said)
	return fmt.Errorf("runc %s of container %q: %w: %s", step, c.config.Metadata.Name, err, text)
}

// logger is a pipe whose lines go into the container's log in the form that the kubelet reads.
func (c *container) logger(stream string) (*os.File, error) {
	reader, writer, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	var log io.WriteCloser
	if c.log == "" {
		log, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	} else {
		log, err = os.OpenFile(c.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	}
	if err != nil {
		reader.Close()
		writer.Close()
		return nil, err
	}
	go func() {
		defer reader.Close()
		defer log.Close()
		lines := bufio.NewReader(reader)
		for {
			line, err := lines.ReadString('\n')
			if line != "" {
				fmt.Fprintf(log, "%s %s F %s\n", time.Now().Format(time.RFC3339Nano), stream, strings.TrimSuffix(line, "\n"))
			}
			if err != nil {
				return
			}
		}
	}()
	return writer, nil
}

// wait notes how the first process ended, and ends what it has left.
func (c *container) wait(pid int) {
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(pid, &status, 0, nil)
		if err == nil {
			break
		}
		if err != syscall.EINTR {
			// It was not a child of ours, which would be a fault of this program.
			panic(fmt.Sprintf("wait for process %d of container %s: %v", pid, c.id, err))
		}
	}
	// Without a pid namespace of its own, a container's other processes outlive its first.
	_ = exec.Command("runc", "delete", "--force", c.id).Run()
	c.mutex.Lock()
	c.finished, c.exit = time.Now(), status.ExitStatus()
	if status.Signaled() {
		c.exit = 128 + int(status.Signal())
	}
	c.mutex.Unlock()
	close(c.ended)
}

// process is the container's first process, 0 if there is none.
func (c *container) process() int {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.finished.IsZero() {
		return c.pid
	}
	return 0
}

// stop asks the container to end, and kills it when the grace period is over.
func (c *container) stop(ctx context.Context, grace time.Duration) {
	if c.process() == 0 {
		return
	}
	if grace > 0 {
		_ = exec.Command("runc", "kill", c.id, "TERM").Run()
		select {
		case <-c.ended:
			return
		case <-ctx.Done():
		case <-time.After(grace):
		}
	}
	_ = exec.Command("runc", "kill", c.id, "KILL").Run()
	<-c.ended
}

// remove takes away what the container has on disk.
func (c *container) remove() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.removed {
		return
	}
	c.removed = true
	_ = unix.Unmount(filepath.Join(c.bundle, "rootfs"), unix.MNT_DETACH)
	_ = os.RemoveAll(c.bundle)
}

func (c *container) status() *cri.ContainerStatus {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	status := &cri.ContainerStatus{
		Id: c.id, Metadata: c.config.Metadata, State: cri.ContainerState_CONTAINER_CREATED, CreatedAt: c.created.UnixNano(),
		Image: c.config.Image, ImageRef: c.config.Image.Image, ImageId: c.config.Image.Image,
		Labels: c.config.Labels, Annotations: c.config.Annotations, Mounts: c.config.Mounts, LogPath: c.log,
	}
	if !c.started.IsZero() {
		status.State, status.StartedAt = cri.ContainerState_CONTAINER_RUNNING, c.started.UnixNano()
	}
	if !c.finished.IsZero() {
		status.State, status.FinishedAt, status.ExitCode = cri.ContainerState_CONTAINER_EXITED, c.finished.UnixNano(), int32(c.exit)
		status.Reason = "Completed"
		if c.exit != 0 {
			status.Reason = "Error"
		}
	}
	return status
}
