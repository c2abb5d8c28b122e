package cluster

import (
	"context"
	"net"
	"path/filepath"
)

const (
	etcdAddress = controlPlane + ":2379"
	etcdURL     = "http://" + etcdAddress
)

func (c *Cluster) startEtcd(ctx context.Context) error {
	c.Etcd = c.component("etcd",
		"--data-dir="+filepath.Join(c.Folder, "etcd"),
		"--listen-client-url="+etcdURL,
		"--listen-peer-url=http://"+controlPlane+":2380")
	if err := c.Etcd.Start(); err != nil {
		return err
	}
	return await(ctx, "etcd listens", c.Etcd, func(context.Context) error {
		connection, err := net.Dial("tcp", etcdAddress)
		if err == nil {
			err = connection.Close()
		}
		return err
	})
}
