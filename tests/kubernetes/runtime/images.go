package runtime

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// images answers the kubelet's questions about images: those that are there are all there can be.
type images struct {
	cri.UnimplementedImageServiceServer
	options Options
}

// imageFolder is where an image lies.
func (o Options) imageFolder(name string) (string, error) {
	folder := filepath.Join(o.Images, strings.ReplaceAll(name, "/", "_"))
	if info, err := os.Stat(folder); err != nil || !info.IsDir() {
		return "", status.Errorf(codes.NotFound, "image %q is not on this node (no folder %s), and there is no registry", name, folder)
	}
	return folder, nil
}

func (i *images) describe(name string) *cri.Image {
	return &cri.Image{Id: name, RepoTags: []string{name}, Size: 1, Spec: &cri.ImageSpec{Image: name}}
}

func (i *images) ListImages(context.Context, *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	entries, err := os.ReadDir(i.options.Images)
	if err != nil {
		return nil, err
	}
	response := &cri.ListImagesResponse{}
	for _, entry := range entries {
		response.Images = append(response.Images, i.describe(entry.Name()))
	}
	return response, nil
}

func (i *images) ImageStatus(_ context.Context, request *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	name := request.Image.Image
	if _, err := i.options.imageFolder(name); err != nil {
		return &cri.ImageStatusResponse{}, nil
	}
	return &cri.ImageStatusResponse{Image: i.describe(name)}, nil
}

func (i *images) PullImage(_ context.Context, request *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	if _, err := i.options.imageFolder(request.Image.Image); err != nil {
		return nil, err
	}
	return &cri.PullImageResponse{ImageRef: request.Image.Image}, nil
}

func (i *images) RemoveImage(context.Context, *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	return &cri.RemoveImageResponse{}, nil
}

func (i *images) ImageFsInfo(context.Context, *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(i.options.State, &stat); err != nil {
		return nil, err
	}
	usage := &cri.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &cri.FilesystemIdentifier{Mountpoint: i.options.State},
		UsedBytes:  &cri.UInt64Value{Value: (stat.Blocks - stat.Bfree) * uint64(stat.Bsize)},
		InodesUsed: &cri.UInt64Value{Value: stat.Files - stat.Ffree},
	}
	return &cri.ImageFsInfoResponse{
		ImageFilesystems:     []*cri.FilesystemUsage{usage},
		ContainerFilesystems: []*cri.FilesystemUsage{usage},
	}, nil
}
