package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sandbox is a pod, as the runtime knows it.
type sandbox struct {
	id      string
	config  *cri.PodSandboxConfig
	handler string
	created time.Time
	stopped bool
}

func (s *sandbox) state() cri.PodSandboxState {
	if s.stopped {
		return cri.PodSandboxState_SANDBOX_NOTREADY
	}
	return cri.PodSandboxState_SANDBOX_READY
}

type service struct {
	cri.UnimplementedRuntimeServiceServer
	options Options

	mutex      sync.Mutex
	sandboxes  map[string]*sandbox
	containers map[string]*container
}

func (s *service) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{
		Version: "0.1.0", RuntimeName: "nvshare-test", RuntimeVersion: "0.1.0", RuntimeApiVersion: "v1",
	}, nil
}

func (s *service) Status(context.Context, *cri.StatusRequest) (*cri.StatusResponse, error) {
	return &cri.StatusResponse{Status: &cri.RuntimeStatus{Conditions: []*cri.RuntimeCondition{
		{Type: cri.RuntimeReady, Status: true},
		{Type: cri.NetworkReady, Status: true},
	}}}, nil
}

func (s *service) RuntimeConfig(context.Context, *cri.RuntimeConfigRequest) (*cri.RuntimeConfigResponse, error) {
	return &cri.RuntimeConfigResponse{
		Linux: &cri.LinuxRuntimeConfiguration{CgroupDriver: cri.CgroupDriver_CGROUPFS},
	}, nil
}

func (s *service) UpdateRuntimeConfig(context.Context, *cri.UpdateRuntimeConfigRequest) (*cri.UpdateRuntimeConfigResponse, error) {
	return &cri.UpdateRuntimeConfigResponse{}, nil
}

func (s *service) RunPodSandbox(_ context.Context, request *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	namespaces := request.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if namespaces.GetPid() == cri.NamespaceMode_POD {
		return nil, status.Error(codes.Unimplemented, "this runtime has no pid namespace that containers of a pod share")
	}
	made := &sandbox{id: uuid.NewString(), config: request.Config, handler: request.RuntimeHandler, created: time.Now()}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.sandboxes[made.id] = made
	return &cri.RunPodSandboxResponse{PodSandboxId: made.id}, nil
}

func (s *service) StopPodSandbox(ctx context.Context, request *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	for _, container := range s.containersOf(request.PodSandboxId) {
		container.stop(ctx, 0)
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if sandbox, found := s.sandboxes[request.PodSandboxId]; found {
		sandbox.stopped = true
	}
	return &cri.StopPodSandboxResponse{}, nil
}

func (s *service) RemovePodSandbox(ctx context.Context, request *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	for _, container := range s.containersOf(request.PodSandboxId) {
		s.remove(ctx, container)
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	delete(s.sandboxes, request.PodSandboxId)
	return &cri.RemovePodSandboxResponse{}, nil
}

func (s *service) PodSandboxStatus(_ context.Context, request *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	sandbox, found := s.sandboxes[request.PodSandboxId]
	if !found {
		return nil, status.Errorf(codes.NotFound, "there is no pod %s", request.PodSandboxId)
	}
	return &cri.PodSandboxStatusResponse{Status: &cri.PodSandboxStatus{
		Id: sandbox.id, Metadata: sandbox.config.Metadata, State: sandbox.state(), CreatedAt: sandbox.created.UnixNano(),
		Network: &cri.PodSandboxNetworkStatus{Ip: s.options.Address},
		Linux: &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{
			Options: sandbox.config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
		Labels: sandbox.config.Labels, Annotations: sandbox.config.Annotations, RuntimeHandler: sandbox.handler,
	}}, nil
}

func (s *service) ListPodSandbox(_ context.Context, request *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	response := &cri.ListPodSandboxResponse{}
	for _, sandbox := range s.sandboxes {
		filter := request.Filter
		if filter.GetId() != "" && filter.Id != sandbox.id ||
			filter.GetState() != nil && filter.State.State != sandbox.state() ||
			!labelled(sandbox.config.Labels, filter.GetLabelSelector()) {
			continue
		}
		response.Items = append(response.Items, &cri.PodSandbox{
			Id: sandbox.id, Metadata: sandbox.config.Metadata, State: sandbox.state(), CreatedAt: sandbox.created.UnixNano(),
			Labels: sandbox.config.Labels, Annotations: sandbox.config.Annotations, RuntimeHandler: sandbox.handler,
		})
	}
	return response, nil
}

func (s *service) CreateContainer(_ context.Context, request *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	sandbox, found := s.sandboxes[request.PodSandboxId]
	if !found {
		return nil, status.Errorf(codes.NotFound, "there is no pod %s", request.PodSandboxId)
	}
	made, err := newContainer(s.options, sandbox, request.Config)
	if err != nil {
		return nil, err
	}
	s.containers[made.id] = made
	return &cri.CreateContainerResponse{ContainerId: made.id}, nil
}

func (s *service) StartContainer(_ context.Context, request *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	container, err := s.container(request.ContainerId)
	if err != nil {
		return nil, err
	}
	return &cri.StartContainerResponse{}, container.start()
}

func (s *service) StopContainer(ctx context.Context, request *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	if container, err := s.container(request.ContainerId); err == nil {
		container.stop(ctx, time.Duration(request.Timeout)*time.Second)
	}
	return &cri.StopContainerResponse{}, nil
}

func (s *service) RemoveContainer(ctx context.Context, request *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	if container, err := s.container(request.ContainerId); err == nil {
		s.remove(ctx, container)
	}
	return &cri.RemoveContainerResponse{}, nil
}

func (s *service) ListContainers(_ context.Context, request *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	response := &cri.ListContainersResponse{}
	for _, container := range s.containers {
		status, filter := container.status(), request.Filter
		if filter.GetId() != "" && filter.Id != container.id ||
			filter.GetPodSandboxId() != "" && filter.PodSandboxId != container.sandbox.id ||
			filter.GetState() != nil && filter.State.State != status.State ||
			!labelled(container.config.Labels, filter.GetLabelSelector()) {
			continue
		}
		response.Containers = append(response.Containers, &cri.Container{
			Id: container.id, PodSandboxId: container.sandbox.id, Metadata: status.Metadata, Image: status.Image,
			ImageRef: status.ImageRef, State: status.State, CreatedAt: status.CreatedAt,
			Labels: status.Labels, Annotations: status.Annotations, ImageId: status.ImageId,
		})
	}
	return response, nil
}

// ContainerStatus, asked to be verbose, gives the process and the OCI spec in the form that containerd has.
func (s *service) ContainerStatus(_ context.Context, request *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	container, err := s.container(request.ContainerId)
	if err != nil {
		return nil, err
	}
	response := &cri.ContainerStatusResponse{Status: container.status()}
	if request.Verbose {
		info, err := json.Marshal(map[string]any{"pid": container.process(), "runtimeSpec": container.spec})
		if err != nil {
			return nil, err
		}
		response.Info = map[string]string{"info": string(info)}
	}
	return response, nil
}

func (s *service) UpdateContainerResources(context.Context, *cri.UpdateContainerResourcesRequest) (*cri.UpdateContainerResourcesResponse, error) {
	return nil, status.Error(codes.Unimplemented, "this runtime changes no limits of a container that runs")
}

// ExecSync runs a command in a container: a probe, or a hook.
func (s *service) ExecSync(ctx context.Context, request *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	container, err := s.container(request.ContainerId)
	if err != nil {
		return nil, err
	}
	if request.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(request.Timeout)*time.Second)
		defer cancel()
	}
	var stdout, stderr bytes.Buffer
	command := exec.CommandContext(ctx, "runc", append([]string{"exec", container.id}, request.Cmd...)...)
	command.Stdout, command.Stderr = &stdout, &stderr
	err = command.Run()
	if ctx.Err() != nil {
		return nil, status.Errorf(codes.DeadlineExceeded, "%q in container %s took longer than %d s", request.Cmd, container.id, request.Timeout)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	return &cri.ExecSyncResponse{
		Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), ExitCode: int32(command.ProcessState.ExitCode()),
	}, nil
}

func (s *service) ReopenContainerLog(context.Context, *cri.ReopenContainerLogRequest) (*cri.ReopenContainerLogResponse, error) {
	return &cri.ReopenContainerLogResponse{}, nil
}

// The kubelet asks for statistics to show them and to evict pods. The tests' nodes evict nobody.

func (s *service) ListContainerStats(context.Context, *cri.ListContainerStatsRequest) (*cri.ListContainerStatsResponse, error) {
	return &cri.ListContainerStatsResponse{}, nil
}

func (s *service) ListPodSandboxStats(context.Context, *cri.ListPodSandboxStatsRequest) (*cri.ListPodSandboxStatsResponse, error) {
	return &cri.ListPodSandboxStatsResponse{}, nil
}

func (s *service) container(id string) (*container, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if container, found := s.containers[id]; found {
		return container, nil
	}
	return nil, status.Errorf(codes.NotFound, "there is no container %s", id)
}

func (s *service) containersOf(sandbox string) []*container {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	var found []*container
	for _, container := range s.containers {
		if container.sandbox.id == sandbox {
			found = append(found, container)
		}
	}
	return found
}

func (s *service) remove(ctx context.Context, container *container) {
	container.stop(ctx, 0)
	container.remove()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	delete(s.containers, container.id)
}

func (s *service) removeAll() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for _, container := range s.containers {
		container.stop(context.Background(), 0)
		container.remove()
	}
	// runc leaves the group above its containers' groups, in every hierarchy.
	for _, pattern := range []string{"/sys/fs/cgroup" + s.options.controlGroup, "/sys/fs/cgroup/*" + s.options.controlGroup} {
		groups, _ := filepath.Glob(pattern)
		for _, group := range groups {
			_ = os.Remove(group)
		}
	}
}

func labelled(labels, wanted map[string]string) bool {
	for key, value := range wanted {
		if labels[key] != value {
			return false
		}
	}
	return true
}
