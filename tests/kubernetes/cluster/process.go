package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
)

// Patience is how long the harness waits for what must happen. It bounds a test that would hang, and is no verdict on speed: the
// machine may have two cores and other work. NVSHARE_TEST_PATIENCE changes it, for whoever knows that it will fail.
var Patience = patience()

func patience() time.Duration {
	if given, err := time.ParseDuration(os.Getenv("NVSHARE_TEST_PATIENCE")); err == nil {
		return given
	}
	return 4 * time.Minute
}

// Process is a program that runs beside the test. It ends with the test, however that ends.
type Process struct {
	Name string
	// Log is the file with what it writes.
	Log string

	argv    []string
	env     []string
	command *exec.Cmd
	ended   chan struct{}
}

// newProcess prepares a program; its log is in the folder. What it had logged before a restart stays.
func newProcess(folder, name string, env []string, argv ...string) *Process {
	return &Process{Name: name, Log: filepath.Join(folder, name+".log"), argv: argv, env: env}
}

// Start starts it, also after Stop or Kill.
func (p *Process) Start() error {
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	command := exec.Command(p.argv[0], p.argv[1:]...)
	command.Stdout, command.Stderr = log, log
	command.Env = append(os.Environ(), p.env...)
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := command.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	ended := make(chan struct{})
	go func() {
		_ = command.Wait()
		close(ended)
	}()
	p.command, p.ended = command, ended
	return nil
}

// Pid is the process's, as the test sees it.
func (p *Process) Pid() int { return p.command.Process.Pid }

// Running says whether it has not ended.
func (p *Process) Running() bool {
	if p.command == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Stop asks it to end (SIGTERM), and waits until it has. It is killed if it does not.
func (p *Process) Stop() { p.end(syscall.SIGTERM) }

// Kill ends it as a crash does.
func (p *Process) Kill() { p.end(syscall.SIGKILL) }

func (p *Process) end(signal syscall.Signal) {
	if !p.Running() {
		return
	}
	_ = p.command.Process.Signal(signal)
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		_ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
		<-p.ended
	}
}

// Tail is the end of the log, for a message.
func (p *Process) Tail(lines int) string {
	text, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// await waits until something is so that a process brings about. It gives up when the process ends.
func await(ctx context.Context, what string, process *Process, done func(context.Context) error) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, Patience, true, func(ctx context.Context) (bool, error) {
		if process != nil && !process.Running() {
			return false, fmt.Errorf("%s has ended", process.Name)
		}
		last = done(ctx)
		return last == nil, nil
	})
	if err == nil {
		return nil
	}
	log := ""
	if process != nil {
		log = fmt.Sprintf("\n--- the end of %s\n%s", process.Log, process.Tail(30))
	}
	return fmt.Errorf("still not: %s: %w (last: %v)%s", what, err, last, log)
}
